"""Who writes in the benchmarks of decoding: models with random weights, of which one kind counts (see `decoding`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.training_step import MODELS
from ptp_lightning.data import StandardLibrary
from ptp_lightning.decoding.text import tokenizer_of
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.backbone import load_backbone

RANK = 16
SUCCESSOR_SCALE = 1000.0  # of the counting model's embeddings, so that layers add little to them


class Subject(NamedTuple):
    """A model that writes, with and without an adapter, and what it should write after its prompt."""

    predictor: PredictorNetwork
    plain: PreTrainedModel
    prompt: list[int]


def random_subject(device: torch.device, model: str, vocab: int, dtype: str, prompt_length: int) -> Subject:
    """Random weights of a model of `training_step`."""
    return _subject(device, model, vocab, dtype, prompt_length, change=lambda _: None)


def counting_subject(device: torch.device, model: str, vocab: int, dtype: str, prompt_length: int) -> Subject:
    """One whose next token is the latest plus one."""
    return _subject(device, model, vocab, dtype, prompt_length, change=let_count)


@torch.no_grad()
def let_count(model: PreTrainedModel) -> None:
    """Let the output head find the embedding of the latest token, and answer with the one after it."""
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    output.weight.copy_(embeddings.weight.roll(1, 0))
    embeddings.weight.mul_(SUCCESSOR_SCALE)


def _subject(
    device: torch.device,
    model: str,
    vocab: int,
    dtype: str,
    prompt_length: int,
    change: Callable[[PreTrainedModel], None],
) -> Subject:
    torch.manual_seed(0)
    network = MODELS[model] | {"model_type": "llama", "vocab_size": vocab, "max_position_embeddings": 4096}
    network |= {"bos_token_id": None, "eos_token_id": None}  # texts of equal lengths
    settings = BackboneSettings(from_config=network, dtype=dtype)  # pyright: ignore[reportArgumentType]
    backbone = load_backbone(settings).to(device).eval()  # pyright: ignore[reportArgumentType]
    change(backbone)
    plain = copy.deepcopy(backbone)
    config = PredictorConfig(settings, lora=LoraSettings(rank=RANK))
    predictor = PredictorNetwork(config, backbone).to(device).eval()
    prompt = torch.randint(vocab, (prompt_length,), generator=torch.Generator().manual_seed(1)).tolist()
    return Subject(predictor, plain, prompt)


def held_out_prompt(predictor: PredictorNetwork, length: int) -> list[int]:
    """The beginning of a file that nothing was trained on."""
    tokenizer = tokenizer_of(predictor)
    encoded = (tokenizer.encode(document.text) for document in StandardLibrary().documents("val"))
    return next(token_ids[:length] for token_ids in encoded if len(token_ids) > length)
