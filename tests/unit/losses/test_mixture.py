"""A mixture is sound where all its terms are, and refuses what is no mixture."""

import math

import pytest
import torch

from ptp_lightning.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    KullbackLeibler,
    MixedLoss,
    NegativeLogOverlap,
    TotalVariation,
    WeightedLoss,
    require_sound,
)
from ptp_lightning.sampling import TokenDistribution
from tests.helpers.tiny_losses import identity, one_target


def test_soundness_is_that_of_all_terms() -> None:
    loss = MixedLoss(terms=[WeightedLoss(CrossEntropy(), 0.1), WeightedLoss(TotalVariation(), 0.9)])
    assert loss.sound_for == {"categorical"} and loss.needs_target
    with pytest.raises(ValueError, match="not a sound loss for the independent objective: .* like a median"):
        require_sound(loss, "independent")
    require_sound(MixedLoss(terms=[WeightedLoss(CrossEntropy()), WeightedLoss(KullbackLeibler())]), "independent")
    tokens_alone = MixedLoss(terms=[WeightedLoss(CrossEntropy(), 2.0), WeightedLoss(BinaryCrossEntropy())])
    assert tokens_alone.sound_for == {"one_hot"} and not tokens_alone.needs_target


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`terms` of MixedLoss, found none"):
        MixedLoss()
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive, finite weight"):
            WeightedLoss(CrossEntropy(), weight)


def test_overlap_by_hand() -> None:
    target = TokenDistribution(torch.tensor([[0.5, 0.5]]), torch.tensor([[1, 2]]))
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    found = NegativeLogOverlap().slot_losses(logits, identity, one_target(target)).nats
    assert found.item() == pytest.approx(-math.log(0.3 + 0.2))


def test_gradient_of_the_overlap_does_not_fade() -> None:
    """The student is sure of another token: the total variation hardly moves, the overlap does."""
    target = TokenDistribution(torch.tensor([[0.0, 1.0]]))
    slopes = []
    for loss in (TotalVariation(), NegativeLogOverlap()):
        logits = torch.tensor([[100.0, 0.0]], requires_grad=True)
        loss.slot_losses(logits, identity, one_target(target)).nats.sum().backward()
        assert logits.grad is not None
        slopes.append(logits.grad[0, 1].item())
    assert abs(slopes[0]) < 1e-30 and slopes[1] == pytest.approx(-1.0)
