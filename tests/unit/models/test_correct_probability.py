"""The probability that a slot is correct, against counting over a grid of u."""

from __future__ import annotations

import pytest
import torch

from ptp_lightning.models.slots.objectives import interval_overlap
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution
from ptp_lightning.testing import check_objective
from ptp_lightning.testing.objectives import SAMPLINGS
from ptp_lightning.testing.objectives import example_slots as slots
from tests.helpers.tiny_predictors import OBJECTIVES

PICKING = [name for name in OBJECTIVES if name != "one_hot"]


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_contract(objective: str) -> None:
    """Also that correct drafts are counted: every u of a fine grid in the token's interval drafts a token."""
    check_objective(OBJECTIVES[objective])


@pytest.mark.parametrize("objective", PICKING)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_slots_are_neither_always_correct_nor_never(objective: str, sampling: SamplingConfig) -> None:
    """In the contract's examples."""
    logits, tokens, teacher = slots(0, sampling)
    found = OBJECTIVES[objective].correct_probability(logits, tokens, teacher, Sampler(sampling))
    assert ((found > 0.05) & (found < 0.95)).sum() > 5


def test_one_hot_is_the_students_probability() -> None:
    sampling = SAMPLINGS[2]
    logits, tokens, teacher = slots(1, sampling)
    found = OBJECTIVES["one_hot"].correct_probability(logits, tokens, teacher, Sampler(sampling))
    torch.testing.assert_close(found, logits.softmax(-1)[torch.arange(40), tokens])


def test_by_hand() -> None:
    """Token 1 owns [0.25, 0.75) of the teacher and [0.5, 1) of the student: they share half of it."""
    Q = TokenDistribution(torch.tensor([0.25, 0.5, 0.25]))
    P = TokenDistribution(torch.tensor([0.5, 0.5, 0.0]))
    assert interval_overlap(P, Q, torch.tensor(1)).item() == 0.5
    assert interval_overlap(Q, P, torch.tensor(1)).item() == 0.5
    assert interval_overlap(P, Q, torch.tensor(0)).item() == 1.0  # [0, 0.25) lies inside [0, 0.5)
    assert interval_overlap(Q, P, torch.tensor(0)).item() == 0.5
    assert interval_overlap(P, Q, torch.tensor(2)).item() == 0.0  # the student never picks it
    assert (
        interval_overlap(Q, P, torch.tensor(2)).item() == 0.0
    )  # the teacher never picks it: nothing to be correct about


def test_a_greedy_student_is_correct_or_wrong() -> None:
    greedy = SamplingConfig(temperature=0)
    logits = torch.tensor([[0.0, 1.0, 0.5], [2.0, 1.0, 0.5]])
    teacher = greedy.distribution(torch.tensor([[0.0, 1.0, 0.0]]).expand(2, -1))
    tokens = torch.tensor([1, 1])
    for objective in PICKING:
        assert OBJECTIVES[objective].correct_probability(logits, tokens, teacher, Sampler(greedy)).tolist() == [1, 0]
