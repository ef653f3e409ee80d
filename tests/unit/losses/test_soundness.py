"""Which loss is sound for which objective: the table, what proves it, and the refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptp_lightning.losses import (
    OBJECTIVES,
    BinaryCrossEntropy,
    CrossEntropy,
    JensenShannon,
    KullbackLeibler,
    Loss,
    NegativeLogOverlap,
    ReverseKullbackLeibler,
    SlotTargets,
    TotalVariation,
    require_sound,
)
from ptp_lightning.sampling import TokenDistribution
from tests.helpers.tiny_losses import DEFINITIONS, DSparkLoss, every_loss, identity

SOUND: dict[type[Loss], set[str]] = {
    CrossEntropy: {"one_hot", "categorical", "independent", "sequential"},
    BinaryCrossEntropy: {"one_hot"},
    KullbackLeibler: {"categorical", "independent", "sequential"},
    ReverseKullbackLeibler: {"categorical"},
    JensenShannon: {"categorical"},
    TotalVariation: {"categorical"},
    NegativeLogOverlap: {"categorical"},
    DSparkLoss: {"categorical"},
}

Q = torch.tensor([[0.70, 0.25, 0.05], [0.10, 0.30, 0.60]], dtype=torch.float64)  # two futures of one context
SHARE = torch.tensor([0.75, 0.25], dtype=torch.float64)  # how often each comes about


def slope(loss: Loss, student: Tensor, distributions: Tensor, shares: Tensor) -> float:
    """How fast the expected loss of one student changes, whose tokens are drawn from distributions `[N, V]`."""
    num_distributions, vocabulary = distributions.shape
    logits = student.log().requires_grad_()
    targets = SlotTargets(
        torch.arange(vocabulary).repeat(num_distributions),
        TokenDistribution(distributions.repeat_interleave(vocabulary, 0)),
        (shares[:, None] * distributions).flatten(),
    )
    loss(logits.expand(num_distributions * vocabulary, -1), identity, targets).total.backward()
    assert logits.grad is not None
    return logits.grad.abs().max().item()


def test_every_loss_is_in_the_table() -> None:
    assert set(DEFINITIONS) == set(SOUND)


@every_loss
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_table(loss: type[Loss], objective: str) -> None:
    assert loss.sound_for | loss.unsound_because.keys() == OBJECTIVES
    if objective in SOUND[loss]:
        require_sound(loss, objective)
        require_sound(loss(), objective)
    else:
        reason = loss.unsound_because[objective]
        with pytest.raises(ValueError, match="not a sound loss") as refusal:
            require_sound(loss(), objective)
        for part in (loss.__name__, objective, reason, "loss.class_path", "CrossEntropy", *loss.sound_for):
            assert part in str(refusal.value)


@every_loss
def test_categorical(loss: type[Loss]) -> None:
    """A slot knows which future it is in: the optimum must be that target."""
    stationary = all(slope(loss(), row, row[None], torch.ones(1)) < 1e-12 for row in Q)
    assert stationary == ("categorical" in SOUND[loss])


@every_loss
def test_independent(loss: type[Loss]) -> None:
    """A slot knows nothing: the optimum must be the mean of the targets, the marginal."""
    stationary = slope(loss(), SHARE @ Q, Q, SHARE) < 1e-12
    assert stationary == ("independent" in SOUND[loss]) == ("sequential" in SOUND[loss])


@every_loss
def test_one_hot(loss: type[Loss]) -> None:
    """A slot knows the token: certainty must cost nothing, whatever the target thinks of the others."""
    logits = torch.tensor([[-100.0, 100.0, -100.0]], dtype=torch.float64)
    total = loss()(logits, identity, SlotTargets(torch.tensor([1]), TokenDistribution(Q[:1]), torch.ones(1))).total
    assert (total.item() < 1e-12) == ("one_hot" in SOUND[loss])


def test_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match=r"categorical.*found 'catgorical'"):
        require_sound(CrossEntropy(), "catgorical")
