"""Warm start: slots begin as the tokens that their u usually picks; everything else begins as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptp_lightning.losses import CrossEntropy, KullbackLeibler
from ptp_lightning.models import (
    CategoricalObjective,
    IndependentObjective,
    LinearInterpolationFeatures,
    OneHotObjective,
    ParallelTokenPredictor,
    PredictorConfig,
)
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training import DistillationModule
from ptp_lightning.training.warm_start import start_warm, usual_tokens
from tests.tiny_distillation import GPT2, LLAMA

VOCABULARY = 32


def make_predictor(backbone: dict[str, Any] = LLAMA, **options: Any) -> ParallelTokenPredictor:
    """A base model that knows nothing: all tokens are equally likely everywhere."""
    defaults = {"features": LinearInterpolationFeatures(8 * VOCABULARY), "head": "linear", "window_length": 4}
    torch.manual_seed(0)
    config = PredictorConfig(BackboneSettings(from_config=backbone), **(defaults | options))
    predictor = ParallelTokenPredictor(config)
    norm: Any = predictor.base_model.base_model.get_submodule("norm" if backbone is LLAMA else "ln_f")
    for parameter in norm.parameters():
        parameter.data.zero_()
    return predictor


@pytest.mark.parametrize("backbone", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("top_k", "tokens"), [(None, VOCABULARY), (8, 8), (1, 1)])
def test_usual_tokens(backbone: dict[str, Any], top_k: int | None, tokens: int) -> None:
    predictor = make_predictor(backbone, sampling=SamplingConfig(top_k=top_k, order="vocabulary"))
    u, token_ids = usual_tokens(predictor)
    assert len(u) > 1000
    assert token_ids.tolist() == (u * tokens).long().tolist()


def test_the_most_frequent_token_counts() -> None:
    """A base model with opinions: not every place picks alike, and the answer is the same on every call."""
    torch.manual_seed(0)
    sampling = SamplingConfig(order="vocabulary")
    config = PredictorConfig(BackboneSettings(from_config=LLAMA), sampling=sampling, window_length=4)
    predictor = ParallelTokenPredictor(config)
    token_ids = usual_tokens(predictor)[1]
    assert torch.equal(usual_tokens(predictor)[1], token_ids)
    assert len(token_ids.unique()) > 4


def test_slots_are_tokens() -> None:
    predictor = make_predictor(objective=CategoricalObjective())
    token_ids = torch.arange(VOCABULARY)
    u = (torch.cat([token_ids, token_ids[:1]]).double() + 0.4) / VOCABULARY  # one more, for the last slot to predict
    table = predictor.student_embed(token_ids)

    def nearest() -> list[int]:
        slots = predictor.embed_slots(u, predictor.config.sampling)
        return torch.cdist(slots, table).argmin(-1).tolist()

    assert nearest() != token_ids.tolist()
    start_warm(predictor)
    assert nearest() == token_ids.tolist()


def test_the_u_of_the_predicted_token_starts_as_ever() -> None:
    cold, warm = (make_predictor(objective=OneHotObjective()) for _ in range(2))
    start_warm(warm)
    before, after = (dict(predictor.slot_encoder.named_parameters()) for predictor in (cold, warm))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["embeddings.0.head.0.weight"]


def test_module_starts_warm_if_asked() -> None:
    def first_embedding(**options: Any) -> torch.Tensor:
        config = PredictorConfig(BackboneSettings(from_config=LLAMA), head="linear", window_length=4)
        torch.manual_seed(0)
        module = DistillationModule(config, **options)
        return next(module.predictor.slot_encoder.embeddings[0].parameters())

    assert torch.equal(first_embedding(), first_embedding(warm_start=False))
    assert not torch.equal(first_embedding(), first_embedding(warm_start=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "mlp"}, "predictor.head: linear.*found mlp"),
        ({"objective": IndependentObjective()}, "found the independent objective: set model.init_args.warm_start"),
    ],
    ids=["head", "objective"],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    config = PredictorConfig(BackboneSettings(from_config=LLAMA), **({"head": "linear", "window_length": 4} | options))
    loss = CrossEntropy() if isinstance(config.objective, OneHotObjective) else KullbackLeibler()
    with pytest.raises(ValueError, match=message):
        DistillationModule(config, loss=loss, warm_start=True)
