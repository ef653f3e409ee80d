"""Predictors for tests that write them to disk and read them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_lightning.export.checkpoint import SETTINGS_FILE
from ptp_lightning.models import (
    BackboneSettings,
    DecoderRefiner,
    LoraSettings,
    PredictorConfig,
    PredictorNetwork,
)
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_windows import one_document

SAMPLING = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, order="vocabulary")
REFINER = DecoderRefiner(num_layers=2, intermediate_size=24, num_refinement_steps=2)


def trained(base: Path | str, **config: Any) -> PredictorNetwork:
    """A predictor whose trained weights are all random, so that a lost weight is noticed."""
    settings = {"window_length": 4, "lora": LoraSettings(rank=2), "sampling": SAMPLING, "correction": REFINER} | config
    predictor = PredictorNetwork(PredictorConfig(BackboneSettings(path=str(base)), **settings)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in predictor.trainable_state().values():
            if weight.is_floating_point():  # not the token order
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return predictor


@torch.no_grad()
def slot_logits(predictor: PredictorNetwork) -> Tensor:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    context = predictor.encode(one_document(ids, torch.tensor([[2, 5]])))
    auxiliaries = torch.arange(1, 9, dtype=torch.float64).reshape(1, 2, 4) / 10
    hidden = predictor.slot_hidden(context, auxiliaries)
    refined = predictor.correct(
        context, predictor.correction_context(context), hidden, ids[:, None, :3].expand(1, 2, 3)
    )
    return torch.cat([predictor.slot_logits(hidden), predictor.slot_logits(refined)])


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of predictor.json; None removes one."""
    about = json.loads((folder / SETTINGS_FILE).read_text()) | changes
    (folder / SETTINGS_FILE).write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
