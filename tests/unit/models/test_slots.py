"""What slots are told: their auxiliaries, and the end of the context one step before it is read."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptp_lightning.models import ParallelTokenPredictor
from tests.tiny_models import tiny_llama
from tests.tiny_predictors import tiny_predictor

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
AUXILIARIES = torch.full((1, 1, 4), 0.25, dtype=torch.float64)


def slots_at(predictor: ParallelTokenPredictor, input_ids: Tensor, start: int) -> Tensor:
    """Slot embeddings of a window that starts at row index `start`."""
    with torch.no_grad():
        context = predictor.encode(input_ids, DOCUMENTS, POSITIONS, torch.tensor([[start]]))
        return predictor.slot_encoder(AUXILIARIES, context.window_ends)


@pytest.mark.parametrize(
    ("start", "changed", "differs"),
    [
        (3, 2, True),  # the last context token
        (3, 1, True),  # through the hidden state before it
        (3, 0, True),  # through that state's own context
        (3, 3, False),  # the window's first token itself
        (5, 4, True),
        (5, 3, False),  # a context of one token: the state before it belongs to another document
    ],
)
def test_slots_see_the_end_of_their_own_context(start: int, changed: int, differs: bool) -> None:
    predictor = tiny_predictor()
    input_ids = torch.tensor([[5, 9, 7, 3, 8, 2, 6]])
    other = input_ids.clone()
    other[0, changed] += 1
    same = torch.equal(slots_at(predictor, input_ids, start), slots_at(predictor, other, start))
    assert same != differs


def test_without_the_context_end_slots_depend_on_auxiliaries_alone() -> None:
    config = replace(tiny_predictor().config, context_end=False)
    predictor = ParallelTokenPredictor(config, tiny_llama())
    one, other = torch.tensor([[5, 9, 7, 3, 8, 2, 6]]), torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    assert torch.equal(slots_at(predictor, one, 3), slots_at(predictor, other, 3))
    assert not any("context_mixer" in name for name in predictor.trainable_state())


@pytest.mark.parametrize(("objective", "carried"), [("categorical", 1), ("one_hot", 2), ("independent", 0)])
def test_which_auxiliaries_a_slot_carries(objective: str, carried: int) -> None:
    predictor = tiny_predictor(objective=objective)
    input_ids = torch.tensor([[5, 9, 7, 3, 8, 2, 6]])
    with torch.no_grad():
        ends = predictor.encode(input_ids, DOCUMENTS, POSITIONS, torch.tensor([[3]])).window_ends
        before = predictor.slot_encoder(AUXILIARIES, ends)
        for place in range(4):
            auxiliaries = AUXILIARIES.clone()
            auxiliaries[..., place] = 0.75
            changed = (predictor.slot_encoder(auxiliaries, ends) != before).any(-1).flatten()
            # u_{i+j} is carried by slot j, and in one-hot by slot j - 1 as well
            expected = [(carried > 0 and slot == place) or (carried > 1 and slot == place - 1) for slot in range(3)]
            assert changed.tolist() == expected
