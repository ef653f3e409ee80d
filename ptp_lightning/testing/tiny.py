"""A tiny predictor with random weights, and rows with windows, for contract tests."""

from __future__ import annotations

from typing import Any

import torch

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.backbone import BackboneSettings, load_backbone
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.testing.contract import generator

VOCABULARY, HIDDEN_SIZE, WINDOW_LENGTH = 48, 32, 5
BACKBONE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SAMPLING = SamplingConfig(temperature=0.8, top_k=12, top_p=0.9)

# Two rows: documents of 6 and 7 tokens, padded; one document of 14 tokens. Windows overlap and leave their document.
DOCUMENT_IDS = torch.tensor([[0] * 6 + [1] * 7 + [-1], [0] * 14])
POSITION_IDS = torch.tensor([[*range(6), *range(7), 0], [*range(14)]])
WINDOW_STARTS = torch.tensor([[2, 5, 10], [1, 8, 9]])


def tiny_predictor(*, untrained: bool = False, sampling: SamplingConfig = SAMPLING, **config: Any) -> PredictorNetwork:
    """A predictor in eval mode.

    Args:
        untrained: leave the weights as they are at the start of a training; by default they are random, so that an
            error shows.
        sampling: its settings.
        **config: further entries of its `PredictorConfig`.
    """
    settings = {"lora": LoraSettings(rank=2), "window_length": WINDOW_LENGTH, "sampling": sampling} | config
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        located = BackboneSettings(from_config=BACKBONE)
        backbone = load_backbone(located)
        for weight in backbone.parameters():
            if weight.ndim == 2:  # the default is so small that errors would hide
                weight.normal_(std=weight.shape[-1] ** -0.5)
        predictor = PredictorNetwork(PredictorConfig(located, **settings), backbone)
        for weight in predictor.parameters():
            if not untrained and weight.requires_grad and not weight.any():
                weight.normal_(std=0.2)
    return predictor.eval()


def tiny_batch() -> PackedBatch:
    """Two rows of random tokens with three windows each."""
    input_ids = torch.randint(VOCABULARY, DOCUMENT_IDS.shape, generator=generator())
    return PackedBatch(input_ids, DOCUMENT_IDS, POSITION_IDS, WINDOW_STARTS, DOCUMENT_IDS >= 0)
