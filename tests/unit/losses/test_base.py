"""The contract of every loss: values and gradients against definitions in float64, masking, chunking, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_lightning.losses import CrossEntropy, Loss, SlotTargets, base
from ptp_lightning.sampling import SamplingConfig, TokenDistribution
from ptp_lightning.testing import check_loss
from tests.helpers.tiny_losses import H, M, V, every_loss, identity, random_logits, random_targets, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_loss
def test_value_and_gradient_match_the_definition(loss: type[Loss], dtype: torch.dtype) -> None:
    targets = random_targets()
    logits = random_logits().to(dtype).requires_grad_()
    total, count = loss()(logits, identity, targets)
    expected = (reference(loss, logits, targets) * targets.weights).sum()
    (expected_grad,) = torch.autograd.grad(expected, logits)
    (grad,) = torch.autograd.grad(total, logits)

    assert total.dtype == torch.float32
    assert count.item() == 10.5  # the sum of weights
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad)


@every_loss
@pytest.mark.parametrize("config", [SamplingConfig(order="vocabulary"), SamplingConfig(top_k=4, top_p=0.8)])
def test_gradcheck_through_the_head(loss: type[Loss], config: SamplingConfig) -> None:
    targets = random_targets(torch.float64, config)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(M, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(chunk_size=4)(hidden, lambda chunk: F.linear(chunk, weight), targets).total

    assert torch.autograd.gradcheck(total, (hidden, weight))


@pytest.fixture(params=["left out", "set to 0"])
def masked_slots_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on other devices."""
    monkeypatch.setattr(base, "allows_dynamic_shapes", lambda tensor: request.param == "left out")


@pytest.mark.usefixtures("masked_slots_are")
@every_loss
def test_contract(loss: type[Loss]) -> None:
    check_loss(loss())


@pytest.mark.usefixtures("masked_slots_are")
@every_loss
def test_no_slot_at_all_gives_zero_with_a_gradient(loss: type[Loss]) -> None:
    token_ids, target, weights = random_targets()
    hidden = torch.randn(M, H, requires_grad=True)
    head = torch.nn.Linear(H, V)
    total, count = loss()(hidden, head, SlotTargets(token_ids, target, torch.zeros_like(weights)))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert hidden.grad is not None
    assert head.weight.grad is not None  # distributed training waits for every parameter
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


@every_loss
def test_no_logits_of_all_slots_live_until_the_backward_pass(loss: type[Loss]) -> None:
    targets = random_targets()
    hidden = torch.randn(M, H, requires_grad=True)
    head = torch.nn.Linear(H, V)
    seen: list[int] = []
    saved: list[int] = []

    def watched_head(chunk: Tensor) -> Tensor:
        if len(chunk):  # the first call, of no row, only asks whether the head is trained
            seen.append(len(chunk))
        return head(chunk)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(chunk_size=4)(hidden, watched_head, targets).total
    assert seen == [4, 4, 2]
    assert max(saved) <= M * H  # the hidden states themselves; not even one chunk of logits, 4 * V > M * H / 2
    assert not any(size in (4 * V, 2 * V) for size in saved)
    total.backward()
    assert seen == [4, 4, 2, 2, 4, 4]  # every chunk once more, one at a time


@every_loss
def test_autocast_projects_in_bfloat16_and_sums_in_float32(loss: type[Loss]) -> None:
    targets = random_targets()
    hidden = torch.randn(M, H, generator=torch.Generator().manual_seed(5), requires_grad=True)
    head = torch.nn.Linear(H, V)
    dtypes: list[torch.dtype] = []

    def watched_head(chunk: Tensor) -> Tensor:
        logits = head(chunk)
        if len(chunk):
            dtypes.append(logits.dtype)
        return logits

    with torch.autocast("cpu", torch.bfloat16):
        total = loss(chunk_size=4)(hidden, watched_head, targets).total
        logits = head(hidden)
    total.backward()  # outside of autocast, as Lightning does
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 6
    assert total.dtype == torch.float32
    torch.testing.assert_close(
        total.double(), (reference(loss, logits, targets) * targets.weights).sum(), rtol=1e-6, atol=0
    )


@every_loss
def test_bad_sizes(loss: type[Loss]) -> None:
    with pytest.raises(ValueError, match="chunk_size=0"):
        loss(chunk_size=0)
    with pytest.raises(ValueError, match=r"\[13, 11\], \[13\] and \[12\]"):
        loss()(random_logits(), identity, random_targets()._replace(weights=torch.ones(12)))
    short = random_targets()
    assert short.target is not None
    short = short._replace(target=TokenDistribution(short.target.probabilities[:5]))
    if loss.needs_target:
        with pytest.raises(ValueError, match=r"M = 13 slots, found \[5\]"):
            loss()(random_logits(), identity, short)


@pytest.mark.parametrize(
    ("is_trained", "num_slots", "expected"),
    [(True, 4, [4]), (True, 5, [4, 1, 1, 4]), (False, 4, [4]), (False, 5, [4, 1])],
)
def test_how_often_slots_are_projected(is_trained: bool, num_slots: int, expected: list[int]) -> None:
    """Several chunks of a trained head once more in the backward pass, so that their logits never exist at once."""
    seen: list[int] = []
    weight = torch.eye(6, requires_grad=is_trained)

    def head(chunk: Tensor) -> Tensor:
        if len(chunk):
            seen.append(len(chunk))
        return chunk @ weight

    hidden = torch.randn(num_slots, 6, requires_grad=True)
    targets = SlotTargets(torch.zeros(num_slots, dtype=torch.long), None, torch.ones(num_slots))
    CrossEntropy(chunk_size=4)(hidden, head, targets).total.backward()
    assert seen == expected


@pytest.mark.parametrize(("chunk_size", "block_size"), [(1, 1), (3, 2), (10, 4), (None, 3), (None, 1000)])
@every_loss
def test_a_frozen_head_gives_the_gradients_of_a_trained_one(
    loss: type[Loss], chunk_size: int | None, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the weights are, and they may be known only once the losses are; some heads cap their logits."""
    monkeypatch.setattr(base, "block_rows", lambda vocab_size, hidden: block_size)
    targets = random_targets(torch.float64)
    weights = torch.linspace(0, 3, M)
    gradients = []
    for is_trained in (True, False):
        generator = torch.Generator().manual_seed(4)
        hidden = torch.randn(M, H, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=is_trained)
        scorer = loss(chunk_size=chunk_size)
        losses = scorer.slot_losses(
            hidden, lambda chunk, weight=weight: 9 * F.linear(chunk, weight / 9).tanh(), targets
        )
        (5 * scorer.weighted_sum(losses, weights).total).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0] is not None and gradients[0].abs().amax() > 0.1


def test_behind_a_frozen_head_no_logits_live_at_all() -> None:
    targets = random_targets()
    hidden = torch.randn(M, H, requires_grad=True)
    weight = torch.randn(V, H)
    losses = CrossEntropy(chunk_size=4).slot_losses(hidden, lambda chunk: F.linear(chunk, weight), targets)
    (saved,) = losses.nats.grad_fn.saved_tensors  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue]
    assert saved.shape == (len(losses.slots), H)  # the gradients


def largest_logit(logits: Tensor, slots: Tensor) -> Tensor:
    assert not torch.is_grad_enabled()
    return logits.amax(-1) + 100 * slots


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 1000])
@every_loss
def test_losses_of_slots_and_a_measure_of_their_logits(loss: type[Loss], chunk_size: int) -> None:
    targets, logits = random_targets(), random_logits()
    losses = loss(chunk_size=chunk_size).slot_losses(logits, identity, targets, largest_logit)
    kept = targets.weights.nonzero().squeeze(-1)
    assert torch.equal(losses.slots, kept)
    torch.testing.assert_close(losses.nats.double(), reference(loss, logits, targets)[kept], rtol=1e-5, atol=1e-7)
    assert losses.measured is not None
    assert torch.equal(losses.measured, logits[kept].amax(-1) + 100 * kept)
    everywhere = losses.measured_on(torch.zeros(M, 1))
    assert everywhere is not None and everywhere.shape == (M, 1)
    assert torch.equal(everywhere[kept, 0], losses.measured) and everywhere.count_nonzero() == len(kept)
    assert loss().slot_losses(logits, identity, targets).measured_on(torch.zeros(M)) is None


@pytest.mark.parametrize("num_kept", [0, 1, 10])
@every_loss
def test_a_measure_sees_every_slot_once_and_leaves_the_loss_alone(loss: type[Loss], num_kept: int) -> None:
    token_ids, target, weights = random_targets()
    weights = weights * (weights.cumsum(0) <= num_kept)
    targets = SlotTargets(token_ids, target, weights)
    seen: list[int] = []

    def measure(logits: Tensor, slots: Tensor) -> Tensor:
        seen.extend(slots.tolist())
        return logits.detach().sum(-1)

    gradients, totals = [], []
    for measured in (None, measure):
        hidden = torch.randn(M, H, generator=torch.Generator().manual_seed(4), requires_grad=True)
        weight = torch.randn(V, H, generator=torch.Generator().manual_seed(5))
        scorer = loss(chunk_size=4)
        losses = scorer.slot_losses(hidden, lambda chunk, weight=weight: F.linear(chunk, weight), targets, measured)
        totals.append(scorer.weighted_sum(losses, weights).total)
        totals[-1].backward()
        gradients.append(hidden.grad)
    assert seen == weights.nonzero().squeeze(-1).tolist()  # not again in the backward pass
    assert torch.equal(totals[0], totals[1]) and torch.equal(gradients[0], gradients[1])


@pytest.mark.usefixtures("masked_slots_are")
def test_behind_a_frozen_head_masked_slots_contribute_nothing() -> None:
    """Nor what is measured of them."""
    token_ids, _, weights = random_targets()
    hidden = torch.randn(M, H, generator=torch.Generator().manual_seed(4))
    hidden[weights == 0] = math.nan
    hidden.requires_grad_()
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(5))
    scorer = CrossEntropy(chunk_size=4)
    losses = scorer.slot_losses(
        hidden, lambda chunk: F.linear(chunk, weight), SlotTargets(token_ids, None, weights), largest_logit
    )
    scorer.weighted_sum(losses, weights).total.backward()
    assert hidden.grad is not None and losses.measured is not None
    assert torch.equal(hidden.grad.any(-1), weights != 0)
    everywhere = losses.measured_on(torch.zeros(M))
    assert everywhere is not None and torch.equal(everywhere != 0, weights != 0)
    nats = torch.zeros(M).index_copy(0, losses.slots, losses.nats.detach())
    assert torch.equal(nats != 0, weights != 0)


def test_weights_may_come_after_the_losses() -> None:
    targets, logits = random_targets(), random_logits()
    scorer = CrossEntropy(chunk_size=4)
    losses = scorer.slot_losses(logits, identity, targets)
    weights = torch.linspace(0, 1, M, requires_grad=True)
    total, count = scorer.weighted_sum(losses, weights)
    kept = targets.weights != 0
    torch.testing.assert_close(
        total.double(), (reference(CrossEntropy, logits, targets) * weights.detach())[kept].sum(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(count, weights.detach()[kept].sum())
    assert not total.requires_grad  # weights get no gradient
