"""The probability that a slot is correct, against counting over a grid of u."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick, token_interval
from ptp_lightning.models.slots.objectives import interval_overlap
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution
from tests.helpers.tiny_predictors import OBJECTIVES

GRID = 2000
PICKING = [name for name in OBJECTIVES if name != "one_hot"]
SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.7, top_k=5),
    SamplingConfig(temperature=0.7, top_k=5, top_p=0.8),
    SamplingConfig(top_p=0.8, order="descending"),
]


def slots(seed: int, sampling: SamplingConfig) -> tuple[Tensor, Tensor, TokenDistribution]:
    """Student logits [40, 8] that agree roughly with the teacher, tokens [40] of the teacher, its distributions."""
    generator = torch.Generator().manual_seed(seed)
    base = 2 * torch.randn(40, 8, generator=generator)
    teacher = sampling.distribution(base)
    tokens = pick(torch.rand(40, generator=generator, dtype=torch.float64), teacher)
    return base + 0.5 * torch.randn(40, 8, generator=generator), tokens, teacher


@pytest.mark.parametrize("objective", PICKING)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_share_of_the_teachers_interval(objective: str, sampling: SamplingConfig) -> None:
    """Every u of a fine grid in the token's interval drafts a token; the fraction of correct drafts is counted."""
    logits, tokens, teacher = slots(0, sampling)
    found = OBJECTIVES[objective].correct_probability(logits, tokens, teacher, Sampler(sampling))
    lower, upper = token_interval(teacher, tokens)
    r = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    u = lower[:, None] + r * (upper - lower)[:, None]
    drafted = OBJECTIVES[objective].tokens_from_logits(logits[:, None].expand(-1, GRID, -1), u, Sampler(sampling))
    counted = (drafted == tokens[:, None]).double().mean(-1)
    # An interval has two ends, each of which a cell of the grid may straddle.
    torch.testing.assert_close(found, counted, rtol=0, atol=2 / GRID)
    assert ((found > 0.05) & (found < 0.95)).sum() > 5  # and not only 0 or 1


def test_one_hot_is_the_students_probability() -> None:
    sampling = SAMPLINGS[2]
    logits, tokens, teacher = slots(1, sampling)
    found = OBJECTIVES["one_hot"].correct_probability(logits, tokens, teacher, Sampler(sampling))
    torch.testing.assert_close(found, logits.softmax(-1)[torch.arange(40), tokens])


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_no_gradient(objective: str) -> None:
    logits, tokens, teacher = slots(2, SamplingConfig())
    correct = OBJECTIVES[objective].correct_probability(
        logits.requires_grad_(), tokens, teacher, Sampler(SamplingConfig())
    )
    assert not correct.requires_grad


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
