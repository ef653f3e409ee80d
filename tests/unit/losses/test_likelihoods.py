"""Cross entropy and binary cross entropy at their limits."""

from __future__ import annotations

import math

import pytest
import torch

from ptp_lightning.losses import BinaryCrossEntropy, CrossEntropy, Loss, SlotTargets
from tests.helpers.tiny_losses import identity


def nats(loss: Loss, logits: list[float], token_id: int) -> float:
    targets = SlotTargets(torch.tensor([token_id]), None, torch.ones(1))
    return loss(torch.tensor([logits]), identity, targets).total.item()


def test_values_by_hand() -> None:
    logits = [0.0, math.log(3.0)]  # softmax 1/4, 3/4; sigmoids 1/2, 3/4
    assert nats(CrossEntropy(), logits, 0) == pytest.approx(math.log(4))
    assert nats(BinaryCrossEntropy(), logits, 0) == pytest.approx(math.log(2) + math.log(4))
    assert nats(BinaryCrossEntropy(), logits, 1) == pytest.approx(math.log(4 / 3) + math.log(2))


@pytest.mark.parametrize("far", [math.inf, 1e30, 200.0])
def test_exactly_zero_where_the_student_is_certain_and_correct(far: float) -> None:
    assert nats(CrossEntropy(), [-far, 0.0, -far], 1) == 0
    assert nats(BinaryCrossEntropy(), [-far, min(far, 1e30), -far], 1) == 0


def test_impossible_tokens_are_harmless_unless_they_are_correct() -> None:
    assert nats(CrossEntropy(), [0.0, 0.0, -math.inf], 1) == pytest.approx(math.log(2))
    assert nats(BinaryCrossEntropy(), [0.0, 0.0, -math.inf], 1) == pytest.approx(2 * math.log(2))
    for loss in (CrossEntropy(), BinaryCrossEntropy()):
        assert nats(loss, [0.0, 0.0, -math.inf], 2) == math.inf


@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy()])
def test_probabilities_too_small_for_float32(loss: Loss) -> None:
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)
    total = loss(logits, identity, SlotTargets(torch.tensor([1]), None, torch.ones(1))).total
    assert total.item() == pytest.approx(200 if isinstance(loss, CrossEntropy) else 200 + math.log(2))
    total.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].item() == pytest.approx(-1)
