"""Tiny networks that run context and slots alike, and packed rows for them, for tests of teacher-free training."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models import CosineFeatures, PredictorConfig, PredictorNetwork, SharedStudent
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_windows import DOCUMENT_IDS, POSITION_IDS, WINDOW_STARTS

VOCAB_SIZE, LENGTH = 30, 5
FULL, TRUNCATED = SamplingConfig(), SamplingConfig(top_k=12, top_p=0.9)


@cache
def make_predictor(
    family: str = "llama", sampling: SamplingConfig = FULL, dtype: torch.dtype = torch.float64
) -> PredictorNetwork:
    torch.manual_seed(1)
    config = PredictorConfig(
        features=CosineFeatures(4), sampling=sampling, window_length=LENGTH, student=SharedStudent()
    )
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=VOCAB_SIZE)).to(dtype)
    for weight in predictor.slot_encoder.parameters():
        weight.data.mul_(5)  # slots that clearly depend on their auxiliaries
    return predictor


@cache
def make_batch(seed: int = 0) -> PackedBatch:
    input_ids = torch.randint(VOCAB_SIZE, DOCUMENT_IDS.shape, generator=torch.Generator().manual_seed(seed))
    return PackedBatch(input_ids, DOCUMENT_IDS, POSITION_IDS, WINDOW_STARTS, DOCUMENT_IDS >= 0)


def count_calls(predictor: PredictorNetwork) -> Any:
    """A function that gives the length of every pass of the stack since."""
    lengths: list[int] = []
    base = predictor.base_model
    hook = getattr(base, base.base_model_prefix).register_forward_pre_hook(
        lambda _, args, named: lengths.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def result() -> list[int]:
        hook.remove()
        return lengths

    return result
