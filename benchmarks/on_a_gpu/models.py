"""Models with random weights for the benchmarks of decoding; one kind counts (see `decoding`)."""

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
EMBEDDING_SCALE = 1000.0  # of the counting model, so that the output of layers is negligible


class BenchmarkModel(NamedTuple):
    """A model with and without an adapter, and a prompt.

    Attributes:
        predictor: with the adapter.
        base_model: without.
        prompt: token ids.
    """

    predictor: PredictorNetwork
    base_model: PreTrainedModel
    prompt: list[int]


def random_model(device: torch.device, model: str, vocab: int, dtype: str, prompt_length: int) -> BenchmarkModel:
    """A model of `training_step` with random weights."""
    return _make(device, model, vocab, dtype, prompt_length, change=lambda _: None)


def counting_model(device: torch.device, model: str, vocab: int, dtype: str, prompt_length: int) -> BenchmarkModel:
    """A model whose next token is the last token plus one."""
    return _make(device, model, vocab, dtype, prompt_length, change=make_counting)


@torch.no_grad()
def make_counting(model: PreTrainedModel) -> None:
    """Let the output head map the embedding of each token to the next token."""
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    output.weight.copy_(embeddings.weight.roll(1, 0))
    embeddings.weight.mul_(EMBEDDING_SCALE)


def _make(
    device: torch.device,
    model: str,
    vocab: int,
    dtype: str,
    prompt_length: int,
    change: Callable[[PreTrainedModel], None],
) -> BenchmarkModel:
    torch.manual_seed(0)
    network = MODELS[model] | {"model_type": "llama", "vocab_size": vocab, "max_position_embeddings": 4096}
    network |= {"bos_token_id": None, "eos_token_id": None}  # no early end of texts
    settings = BackboneSettings(from_config=network, dtype=dtype)  # pyright: ignore[reportArgumentType]
    backbone = load_backbone(settings).to(device).eval()  # pyright: ignore[reportArgumentType]
    change(backbone)
    base_model = copy.deepcopy(backbone)
    config = PredictorConfig(settings, lora=LoraSettings(rank=RANK))
    predictor = PredictorNetwork(config, backbone).to(device).eval()
    prompt = torch.randint(vocab, (prompt_length,), generator=torch.Generator().manual_seed(1)).tolist()
    return BenchmarkModel(predictor, base_model, prompt)


def held_out_prompt(predictor: PredictorNetwork, length: int) -> list[int]:
    """The first tokens of a held-out file."""
    tokenizer = tokenizer_of(predictor)
    encoded = (tokenizer.encode(document.text) for document in StandardLibrary().documents("val"))
    return next(token_ids[:length] for token_ids in encoded if len(token_ids) > length)
