"""Tiny predictors with random, clearly non-zero adapters, for tests."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ptp_lightning.models import (
    CategoricalObjective,
    DecoderRefiner,
    FullCopyStudent,
    GatedLoraStudent,
    IndependentObjective,
    LoraSettings,
    MarkovHead,
    OneHotObjective,
    PredictorConfig,
    PredictorNetwork,
    SequentialObjective,
    SharedStudent,
    TokenConditionedHead,
)
from ptp_lightning.models.correction.correction import Correction
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.models.students import Student
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_models import TINY_MODELS, cast_weights

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (CategoricalObjective(), OneHotObjective(), IndependentObjective(), SequentialObjective())
}
STUDENTS: dict[str, Student] = {
    student.name: student for student in (GatedLoraStudent(), FullCopyStudent(), SharedStudent())
}
REFINER = DecoderRefiner(num_layers=1, num_refinement_steps=2)
CORRECTIONS: dict[str, Correction] = {
    "refiner": REFINER,
    "token_conditioned": TokenConditionedHead(intermediate_size=24),
    "token_conditioned_parallel": TokenConditionedHead(intermediate_size=24, order="parallel", num_refinement_steps=2),
    "markov": MarkovHead(rank=5),
    "markov_parallel": MarkovHead(rank=5, order="parallel", num_refinement_steps=2),
}
"""One row for each correction and order."""


def sharpen(model: PreTrainedModel, factor: float) -> None:
    """Scale the output head, so that some tokens are likely."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.weight.data.mul_(factor)


def tiny_predictor(
    family: str = "llama",
    objective: str = "categorical",
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008  frozen
    *,
    window_length: int = 8,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 2.0,
    student: str = "gated_lora",
    sampling_range: SamplingRange | None = None,
    correction: Correction | None = REFINER,
    draft_vocabulary: Sequence[int] | None = None,
    slot_layers: int | None = None,
    ngrams: int | None = None,
    seed: int = 1,
    **model: Any,
) -> PredictorNetwork:
    """In eval mode, with random weights everywhere.

    Args:
        draft_vocabulary: ascending token ids; None for all tokens.
        ngrams: number of n-grams, which are not set.
        sharpness: as in `sharpen`.
        seed: of the trained weights.
        **model: further arguments of the builder in TINY_MODELS.
    """
    backbone = cast_weights(TINY_MODELS[family](**model), dtype)
    config = PredictorConfig(
        objective=OBJECTIVES[objective],
        lora=LoraSettings(rank=4),
        sampling=sampling,
        window_length=window_length,
        correction=correction,
        student=STUDENTS[student],
        sampling_range=sampling_range,
        draft_vocabulary=None if draft_vocabulary is None else len(draft_vocabulary),
        slot_layers=slot_layers,
        ngrams=ngrams,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        sharpen(backbone, sharpness)
        predictor = PredictorNetwork(config, backbone)
        for name, parameter in predictor.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
            elif name.startswith("student_copy"):
                parameter += 0.05 * torch.randn_like(parameter)
            elif ("correction" in name or "sampling_encoder" in name) and not parameter.any():
                parameter.normal_(std=0.2)
        if draft_vocabulary is not None:
            predictor.choose_draft_vocabulary(torch.tensor(draft_vocabulary))
    return predictor.eval()
