"""Weights of the slots of a window, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptp_lightning.losses import (
    AcceptedLengthWeights,
    CrossEntropy,
    GeometricWeights,
    LossSum,
    PositionWeights,
    SlotTargets,
    UniformWeights,
)
from ptp_lightning.testing import check_position_weights
from tests.helpers.tiny_losses import identity

MASK = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
CORRECT = torch.tensor([[0.5, 0.25, 0.125], [0.0, 1.0, math.nan], [math.nan, math.nan, math.nan]])

CASES: list[tuple[PositionWeights, list[list[float]]]] = [
    (UniformWeights(), [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
    (GeometricWeights(decay=0.5), [[1, 0.5, 0.25], [1, 0.5, 0], [0, 0, 0]]),
    (GeometricWeights(decay=1), [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
    (GeometricWeights(decay=2), [[1, 2, 4], [1, 2, 0], [0, 0, 0]]),
    (AcceptedLengthWeights(), [[1, 0.5, 0.125], [1, 0, 0], [0, 0, 0]]),
]
every_kind = pytest.mark.parametrize(("weights", "expected"), CASES)


@every_kind
def test_by_hand(weights: PositionWeights, expected: list[list[float]]) -> None:
    found = weights(MASK, CORRECT if weights.needs_correct_probability else None)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(expected))


@every_kind
def test_any_shape_of_windows(weights: PositionWeights, expected: list[list[float]]) -> None:
    shaped = weights(MASK.view(3, 1, 3), CORRECT.view(3, 1, 3))
    assert torch.equal(shaped.view(3, 3), torch.tensor(expected))
    assert weights(torch.ones(2, 1, dtype=torch.bool), torch.rand(2, 1)).tolist() == [[1], [1]]


@every_kind
def test_contract(weights: PositionWeights, expected: list[list[float]]) -> None:
    check_position_weights(weights)


def test_no_gradient() -> None:
    probability = torch.rand(2, 3, requires_grad=True)
    assert not AcceptedLengthWeights()(torch.ones(2, 3, dtype=torch.bool), probability).requires_grad


@pytest.mark.parametrize("decay", [0.0, -0.5, math.nan, math.inf])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match="positive, finite decay of position_weights, found"):
        GeometricWeights(decay=decay)


class TestNormalisation:
    """The loss is the mean over slots in which each counts as often as its weight says."""

    LOGITS = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    TOKENS = torch.arange(9) % 4

    def loss(self, rows: slice, weights: Tensor) -> LossSum:
        targets = SlotTargets(self.TOKENS[rows], None, weights.flatten()[rows])
        return CrossEntropy()(self.LOGITS[rows], identity, targets)

    @every_kind
    def test_weighted_mean(self, weights: PositionWeights, expected: list[list[float]]) -> None:
        total, count = self.loss(slice(None), weights(MASK, CORRECT))
        nats = -self.LOGITS.double().log_softmax(-1)[torch.arange(9), self.TOKENS]
        flat = [entry for row in expected for entry in row]
        by_hand = sum(weight * float(nat) for weight, nat in zip(flat, nats, strict=True)) / sum(flat)
        assert float(total / count) == pytest.approx(by_hand, rel=1e-6)

    @every_kind
    def test_ranks_add_up(self, weights: PositionWeights, expected: list[list[float]]) -> None:
        """However the windows are spread over ranks, sums and counts add up to those of one rank."""
        spread = weights(MASK, CORRECT)
        whole = self.loss(slice(None), spread)
        first, second = self.loss(slice(0, 3), spread), self.loss(slice(3, 9), spread)
        assert float(first.count + second.count) == float(whole.count) == sum(map(sum, expected))
        assert float(first.total + second.total) == pytest.approx(float(whole.total), rel=1e-6)

    def test_only_ratios_matter(self) -> None:
        once, thrice = (self.loss(slice(None), scale * GeometricWeights(0.5)(MASK)) for scale in (1, 3))
        assert float(once.total / once.count) == pytest.approx(float(thrice.total / thrice.count), rel=1e-6)
