"""Divergences: exactly zero at equality, never negative, tokens without probability on either side."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptp_lightning.losses import (
    Divergence,
    JensenShannon,
    KullbackLeibler,
    NegativeLogOverlap,
    ReverseKullbackLeibler,
    TotalVariation,
)
from ptp_lightning.sampling import SamplingConfig, TokenDistribution
from tests.helpers.tiny_losses import (
    V,
    every_divergence,
    full_probabilities,
    identity,
    one_target,
    random_logits,
    random_targets,
    reference,
)


def nats(loss: Divergence, logits: Tensor, target: TokenDistribution) -> Tensor:
    """The divergence of each slot, [M]."""
    return loss.slot_losses(logits, identity, one_target(target)).nats


def by_hand(loss: Divergence, student: list[float], target: list[float], token_ids: list[int] | None = None) -> float:
    ids = None if token_ids is None else torch.tensor([token_ids])
    return nats(loss, torch.tensor([student]).log(), TokenDistribution(torch.tensor([target]), ids)).item()


def test_values_by_hand() -> None:
    p, q = [0.25, 0.75], [0.5, 0.5]
    assert by_hand(KullbackLeibler(), p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert by_hand(ReverseKullbackLeibler(), p, q) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    middle = [0.375, 0.625]
    halves = sum(a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(p, q, middle, strict=True))
    assert by_hand(JensenShannon(), p, q) == pytest.approx(halves / 2)
    assert by_hand(TotalVariation(), p, q) == pytest.approx(0.25)


def test_truncated_values_by_hand() -> None:
    """The target lists tokens 2 and 0, removes token 2, and does not list token 1."""
    p, q, ids = [0.5, 0.25, 0.25], [0.0, 1.0], [2, 0]
    assert by_hand(KullbackLeibler(), p, q, ids) == pytest.approx(math.log(2))
    assert by_hand(ReverseKullbackLeibler(floor=1e-3), p, q, ids) == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * math.log(1000)
    )
    expected = 0.5 * (math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2))
    assert by_hand(JensenShannon(), p, q, ids) == pytest.approx(expected)
    assert by_hand(TotalVariation(), p, q, ids) == pytest.approx(0.5)


@every_divergence
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(order="vocabulary"),
        SamplingConfig(order="descending"),
        SamplingConfig(order="vocabulary", top_p=0.99999),
        SamplingConfig(top_k=7),
        SamplingConfig(top_k=7, top_p=0.6),
    ],
)
def test_exactly_zero_at_equality(loss: type[Divergence], config: SamplingConfig) -> None:
    logits = random_logits()
    target = config.distribution(logits)
    kept = full_probabilities(target) > 0
    student = logits.masked_fill(~kept, -math.inf).requires_grad_()
    divergence = nats(loss(), student, target)
    divergence.sum().backward()
    assert (divergence == 0).all()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@every_divergence
def test_exactly_zero_over_a_large_vocabulary(loss: type[Divergence]) -> None:
    logits = 2 * torch.randn(16, 50_000, generator=torch.Generator().manual_seed(6))
    target = SamplingConfig(order="descending").distribution(logits)
    assert not torch.equal(target.probabilities, logits.softmax(-1).gather(-1, target.token_ids))  # pyright: ignore
    assert (nats(loss(), logits, target) == 0).all()


@every_divergence
@pytest.mark.parametrize("difference", [1e-4, 1e-3, 1e-1])
def test_never_negative_and_keeps_its_digits_close_to_zero(loss: type[Divergence], difference: float) -> None:
    """The textbook sum of `q (log q - log p)` gives -1e-7 .. 1e-7 here."""
    logits = random_logits().repeat(20, 1)
    target = SamplingConfig(order="descending").distribution(logits)
    student = logits + difference * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    student.requires_grad_()
    found = nats(loss(), student, target)
    exact_student = student.detach().double().requires_grad_()
    # One distribution for both, in float64: the divergence of what the rounded logits stand for.
    same = TokenDistribution(logits.double().softmax(-1))
    exact = reference(loss, exact_student, one_target(same))
    found.sum().backward()
    exact.sum().backward()
    assert (found >= 0).all()
    rounding = {1e-4: 2e-10, 1e-3: 2e-9, 1e-1: 1e-7}[difference]
    if loss in (TotalVariation, NegativeLogOverlap):  # of first order: what counts as equality is seen
        rounding = 4e-6
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=rounding)
    assert student.grad is not None and exact_student.grad is not None
    assert student.grad.isfinite().all()
    if loss not in (TotalVariation, NegativeLogOverlap):  # its gradient jumps where P crosses Q
        torch.testing.assert_close(student.grad.double(), exact_student.grad, rtol=1e-2, atol=4e-6)


@every_divergence
def test_never_negative_anywhere(loss: type[Divergence]) -> None:
    generator = torch.Generator().manual_seed(8)
    for scale in (0.1, 3.0, 30.0):
        target = SamplingConfig(top_k=5).distribution(scale * torch.randn(500, V, generator=generator))
        divergence = nats(loss(), scale * torch.randn(500, V, generator=generator), target)
        assert (divergence >= 0).all() and divergence.isfinite().all()


@every_divergence
def test_no_nan_where_the_student_is_certain(loss: type[Divergence]) -> None:
    """0 log 0 and 0 / 0: tokens of probability 0 on both sides or on one, inside the target's list and outside."""
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [0.0, -200.0, -math.inf, 0.0]], requires_grad=True)
    listed = torch.tensor([[1, 2, 0], [0, 1, 2]])
    target = TokenDistribution(torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.25, 0.0]]), token_ids=listed)
    divergence = nats(loss(), logits, target)
    divergence.sum().backward()
    assert divergence.isfinite().all() and (divergence > 0).all()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()
    exact = reference(loss, logits.detach(), one_target(target))
    torch.testing.assert_close(divergence.double(), exact, rtol=1e-6, atol=0)


def test_impossible_tokens() -> None:
    """-inf logits are harmless where the target has no mass and an infinite loss where it has; only KL minds."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)

    def divergence(loss: Divergence, probabilities: list[float]) -> Tensor:
        return nats(loss, logits, TokenDistribution(torch.tensor([probabilities]), torch.tensor([[1, 2]])))

    harmless = divergence(KullbackLeibler(), [1.0, 0.0])
    assert harmless.item() == pytest.approx(math.log(2))
    harmless.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))
    assert divergence(KullbackLeibler(), [0.5, 0.5]).item() == math.inf
    for loss in (ReverseKullbackLeibler(), JensenShannon(), TotalVariation()):
        assert divergence(loss, [0.5, 0.5]).isfinite()


def test_kullback_leibler_of_probabilities_too_small_for_float32() -> None:
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)  # P_1 = e^-200 is 0 in float32
    divergence = nats(KullbackLeibler(), logits, TokenDistribution(torch.tensor([[0.5, 0.5]])))
    assert divergence.item() == pytest.approx(100 - math.log(2))
    divergence.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].item() == pytest.approx(-0.5)


@every_divergence
def test_a_target_distribution_is_needed(loss: type[Divergence]) -> None:
    with pytest.raises(ValueError, match=f"{loss.__name__}.*CrossEntropy"):
        loss()(random_logits(), identity, random_targets()._replace(target=None))


class TestFloorOfTheReverseDivergence:
    """Outside of the target's support, where KL(P || Q) is infinite."""

    LOGITS = random_logits(torch.float64)
    TARGET = SamplingConfig(top_k=4).distribution(3 * random_logits(torch.float64).flip(0))

    @pytest.mark.parametrize("floor", [math.exp(-1), 1e-2, 1e-6, 1e-30])
    def test_bounds_the_divergence_from_a_target_with_that_floor(self, floor: float) -> None:
        student, target = self.LOGITS.softmax(-1), full_probabilities(self.TARGET)
        floored = target.where(target > 0, floor)
        textbook = (student * (student / floored).log()).sum(-1)
        found = nats(ReverseKullbackLeibler(floor=floor), self.LOGITS, self.TARGET)
        assert (found >= textbook).all() and (found >= 0).all()

    def test_a_lower_floor_costs_the_mass_outside(self) -> None:
        outside = (self.LOGITS.softmax(-1) * (full_probabilities(self.TARGET) == 0)).sum(-1)
        low, high = (nats(ReverseKullbackLeibler(floor=f), self.LOGITS, self.TARGET) for f in (1e-8, 1e-2))
        torch.testing.assert_close(low - high, outside * math.log(1e6))

    def test_changes_nothing_where_the_target_keeps_all(self) -> None:
        target = SamplingConfig().distribution(self.LOGITS.flip(0))
        low, high = (nats(ReverseKullbackLeibler(floor=f), self.LOGITS, target) for f in (1e-8, 1e-2))
        assert torch.equal(low, high)

    @pytest.mark.parametrize("floor", [0.0, -1.0, 0.4, math.nan])
    def test_out_of_range(self, floor: float) -> None:
        with pytest.raises(ValueError, match="floor of ReverseKullbackLeibler in .*found"):
            ReverseKullbackLeibler(floor=floor)


def test_bounds() -> None:
    """Jensen-Shannon is symmetric and at most log 2; the total variation at most 1: reached where nothing is shared."""
    apart = ([1.0, 0.0], [0.0, 1.0])
    assert by_hand(JensenShannon(), *apart) == pytest.approx(math.log(2))
    assert by_hand(TotalVariation(), *apart) == pytest.approx(1)
    p, q = [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]
    assert by_hand(JensenShannon(), p, q) == pytest.approx(by_hand(JensenShannon(), q, p))
