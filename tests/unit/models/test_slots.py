"""What slots are told: which auxiliaries each of them carries."""

import pytest
import torch

from tests.tiny_predictors import tiny_predictor

AUXILIARIES = torch.full((1, 1, 4), 0.25, dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "carried"), [("categorical", 1), ("one_hot", 2), ("independent", 0), ("sequential", 0)]
)
def test_which_auxiliaries_a_slot_carries(objective: str, carried: int) -> None:
    encoder = tiny_predictor(objective=objective).slot_encoder
    with torch.no_grad():
        before = encoder(AUXILIARIES)
        for place in range(4):
            auxiliaries = AUXILIARIES.clone()
            auxiliaries[..., place] = 0.75
            changed = (encoder(auxiliaries) != before).any(-1).flatten()
            # u_{i+j} is carried by slot j, and in one-hot by slot j - 1 as well
            expected = [(carried > 0 and slot == place) or (carried > 1 and slot == place - 1) for slot in range(3)]
            assert changed.tolist() == expected
