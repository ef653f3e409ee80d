"""Which auxiliaries each slot carries."""

import pytest
import torch

from ptp_lightning.models import CategoricalObjective, IndependentObjective, SequentialObjective
from ptp_lightning.models.slots.objectives import PickingObjective
from ptp_lightning.sampling import Sampler, SamplingConfig
from tests.helpers.tiny_predictors import tiny_predictor

AUXILIARIES = torch.full((1, 1, 4), 0.25, dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "carried"), [("categorical", 1), ("one_hot", 2), ("independent", 0), ("sequential", 0)]
)
def test_which_auxiliaries_a_slot_carries(objective: str, carried: int) -> None:
    encoder = tiny_predictor(objective=objective).slot_encoder
    with torch.no_grad():
        before = encoder(AUXILIARIES)
        for position in range(4):
            auxiliaries = AUXILIARIES.clone()
            auxiliaries[..., position] = 0.75
            changed = (encoder(auxiliaries) != before).any(-1).flatten()
            # u_{i+j} is carried by slot j, and in one-hot by slot j - 1 as well
            expected = [
                (carried > 0 and slot == position) or (carried > 1 and slot == position - 1) for slot in range(3)
            ]
            assert changed.tolist() == expected


@pytest.mark.parametrize("objective", [CategoricalObjective, IndependentObjective, SequentialObjective])
def test_drafts_allow_for_an_error(objective: type[PickingObjective]) -> None:
    """Of P = (0.2, 0.01, 0.79), u = 0.205 names the second token, but the third is the better guess."""
    logits, u = torch.tensor([[0.2, 0.01, 0.79]]).log(), torch.tensor([0.205], dtype=torch.float64)
    sampler = Sampler(SamplingConfig())
    assert objective().tokens_from_logits(logits, u, sampler).tolist() == [1]
    assert objective(cdf_error=0.05).tokens_from_logits(logits, u, sampler).tolist() == [2]


def test_an_error_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="predictor.objective.init_args.cdf_error >= 0, found -1"):
        CategoricalObjective(cdf_error=-1)
