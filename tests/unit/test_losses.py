"""Losses: values and gradients against float64 references, masking, chunking, memory, soundness."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_lightning.losses import CrossEntropy, KullbackLeibler, Loss, SlotTargets, require_sound
from ptp_lightning.sampling import SamplingConfig, TokenDistribution

LOSSES = [CrossEntropy, KullbackLeibler]
M, H, V = 13, 5, 11


def identity(hidden: Tensor) -> Tensor:
    return hidden


def random_targets(dtype: torch.dtype = torch.float32, config: SamplingConfig | None = None) -> SlotTargets:
    generator = torch.Generator().manual_seed(1)
    config = config or SamplingConfig(temperature=0.7, top_k=6, top_p=0.9)
    teacher = config.distribution(3 * torch.randn(M, V, generator=generator, dtype=dtype))
    token_ids = torch.randint(V, (M,), generator=generator)
    weights = torch.tensor([1, 1, 0, 1, 0.5, 1, 0, 0, 1, 1, 2, 1, 1], dtype=dtype)
    return SlotTargets(token_ids, teacher, weights)


def random_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.randn(M, V, generator=torch.Generator().manual_seed(2), dtype=dtype)


def full_probabilities(teacher: TokenDistribution) -> Tensor:
    if teacher.token_ids is None:
        return teacher.probabilities.double()
    shape = (*teacher.probabilities.shape[:-1], V)
    return torch.zeros(shape, dtype=torch.float64).scatter(-1, teacher.token_ids, teacher.probabilities.double())


def reference(loss: type[Loss], logits: Tensor, target: SlotTargets) -> Tensor:
    """The definition, in float64, over the whole vocabulary."""
    log_student = logits.double().log_softmax(-1)
    if loss is CrossEntropy:
        per_slot = -log_student[torch.arange(len(logits)), target.token_ids]
    else:
        assert target.teacher is not None
        per_slot = F.kl_div(log_student, full_probabilities(target.teacher), reduction="none").sum(-1)
    return (per_slot * target.weights).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_match_the_definition(loss: type[Loss], dtype: torch.dtype) -> None:
    target = random_targets()
    logits = random_logits().to(dtype).requires_grad_()
    total, count = loss()(logits, identity, target)
    expected = reference(loss, logits, target)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    (grad,) = torch.autograd.grad(total, logits)

    assert total.dtype == torch.float32
    assert count.item() == 10  # of 13 weights, 3 are 0
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad)


def test_values_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])  # P = 1/4, 3/4
    teacher = TokenDistribution(torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]]))  # all on token 1
    target = SlotTargets(torch.tensor([0]), teacher, torch.ones(1))
    assert CrossEntropy()(logits, identity, target).total.item() == pytest.approx(math.log(4))
    assert KullbackLeibler()(logits, identity, target).total.item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(order="vocabulary"),
        SamplingConfig(order="descending"),
        SamplingConfig(order="vocabulary", top_p=0.99999),
        SamplingConfig(top_k=7),
    ],
)
def test_divergence_is_exactly_zero_at_equality(config: SamplingConfig) -> None:
    logits = random_logits()
    teacher = config.distribution(logits)
    kept = full_probabilities(teacher) > 0
    student = logits.masked_fill(~kept, -math.inf).requires_grad_()
    target = SlotTargets(torch.zeros(M, dtype=torch.int64), teacher, torch.ones(M))
    total = KullbackLeibler()(student, identity, target).total
    total.backward()
    assert total.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_divergence_is_exactly_zero_over_a_large_vocabulary() -> None:
    logits = 2 * torch.randn(16, 50_000, generator=torch.Generator().manual_seed(6))
    teacher = SamplingConfig(order="descending").distribution(logits)
    assert not torch.equal(teacher.probabilities, logits.softmax(-1).gather(-1, teacher.token_ids))  # pyright: ignore
    target = SlotTargets(torch.zeros(16, dtype=torch.int64), teacher, torch.ones(16))
    assert KullbackLeibler()(logits, identity, target).total.item() == 0


def test_divergence_is_never_negative_and_keeps_its_digits_close_to_zero() -> None:
    """The textbook sum of `q (log q - log p)` gives -1e-7 .. 1e-7 here."""
    logits = random_logits().repeat(20, 1)
    teacher = SamplingConfig(order="descending").distribution(logits)
    student = logits + 1e-3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    for index in range(len(logits)):
        row = slice(index, index + 1)
        distribution = TokenDistribution(teacher.probabilities[row], teacher.token_ids[row])  # pyright: ignore
        target = SlotTargets(torch.zeros(1, dtype=torch.int64), distribution, torch.ones(1))
        total = KullbackLeibler()(student[row], identity, target).total
        exact = F.kl_div(
            student[row].double().log_softmax(-1),
            logits[row].double().log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        assert total >= 0
        torch.testing.assert_close(total.double(), exact, rtol=1e-2, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("config", [SamplingConfig(order="vocabulary"), SamplingConfig(top_k=4, top_p=0.8)])
def test_gradcheck_through_the_head(loss: type[Loss], config: SamplingConfig) -> None:
    target = random_targets(torch.float64, config)
    hidden = torch.randn(M, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(chunk_size=4)(hidden, lambda chunk: F.linear(chunk, weight), target).total

    assert torch.autograd.gradcheck(total, (hidden, weight))


@pytest.mark.parametrize("chunk_size", [1, 3, 9, 10, 11])  # 10 slots count: dividing, not dividing, exact, beyond
@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_change_nothing(loss: type[Loss], chunk_size: int) -> None:
    target = random_targets()
    hidden = torch.randn(M, H, generator=torch.Generator().manual_seed(4))
    results = []
    for size in (chunk_size, 1000):
        leaf = hidden.clone().requires_grad_()
        head = torch.nn.Linear(H, V)
        torch.nn.init.constant_(head.bias, 0.1)
        torch.nn.init.eye_(head.weight)
        total, count = loss(chunk_size=size)(leaf, head, target)
        (total / count).backward()
        results.append((total.detach(), count, leaf.grad, head.weight.grad, head.bias.grad))
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_slots_contribute_nothing(loss: type[Loss], garbage: float) -> None:
    token_ids, teacher, weights = random_targets()
    assert teacher is not None
    masked = weights == 0
    clean = random_logits().requires_grad_()
    dirty = clean.detach().masked_fill(masked[:, None], garbage).requires_grad_()
    dirty_target = SlotTargets(
        token_ids.masked_fill(masked, -100),
        teacher._replace(probabilities=teacher.probabilities.masked_fill(masked[:, None], math.nan)),
        weights,
    )
    expected = loss()(clean, identity, SlotTargets(token_ids, teacher, weights))
    found = loss()(dirty, identity, dirty_target)
    assert found.total == expected.total
    assert found.count == expected.count
    found.total.backward()
    expected.total.backward()
    assert dirty.grad is not None
    assert (dirty.grad[masked] == 0).all()
    torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_slot_at_all_gives_zero_with_a_gradient(loss: type[Loss]) -> None:
    token_ids, teacher, weights = random_targets()
    hidden = torch.randn(M, H, requires_grad=True)
    head = torch.nn.Linear(H, V)
    total, count = loss()(hidden, head, SlotTargets(token_ids, teacher, torch.zeros_like(weights)))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert hidden.grad is not None
    assert head.weight.grad is not None  # distributed training waits for every parameter
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_impossible_tokens() -> None:
    """-inf logits are harmless where the teacher has no mass and an infinite loss where it has."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    weights = torch.ones(1)

    def divergence(probabilities: list[float]) -> Tensor:
        teacher = TokenDistribution(torch.tensor([probabilities]), torch.tensor([[1, 2]]))
        return KullbackLeibler()(logits, identity, SlotTargets(torch.tensor([1]), teacher, weights)).total

    harmless = divergence([1.0, 0.0])
    assert harmless.item() == pytest.approx(math.log(2))
    harmless.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))
    assert divergence([0.5, 0.5]).item() == math.inf

    target = SlotTargets(torch.tensor([1]), None, weights)
    assert CrossEntropy()(logits, identity, target).total.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", LOSSES)
def test_probabilities_too_small_for_float32(loss: type[Loss]) -> None:
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)  # P_1 = e^-200 is 0 in float32
    teacher = TokenDistribution(torch.tensor([[0.5, 0.5]]))
    target = SlotTargets(torch.tensor([1]), teacher, torch.ones(1))
    total = loss()(logits, identity, target).total
    assert total.item() == pytest.approx(200 if loss is CrossEntropy else 100 - math.log(2))
    total.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].item() == pytest.approx(-1 if loss is CrossEntropy else -0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_logits_of_all_slots_live_until_the_backward_pass(loss: type[Loss]) -> None:
    target = random_targets()
    hidden = torch.randn(M, H, requires_grad=True)
    head = torch.nn.Linear(H, V)
    seen: list[int] = []
    saved: list[int] = []

    def watched_head(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return head(chunk)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(chunk_size=4)(hidden, watched_head, target).total
    assert seen == [4, 4, 2]
    assert max(saved) <= M * H  # the hidden states themselves; not even one chunk of logits, 4 * V > M * H / 2
    assert not any(size in (4 * V, 2 * V) for size in saved)
    total.backward()
    assert seen == [4, 4, 2, 2, 4, 4]  # every chunk once more, one at a time


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_projects_in_bfloat16_and_sums_in_float32(loss: type[Loss]) -> None:
    target = random_targets()
    hidden = torch.randn(M, H, generator=torch.Generator().manual_seed(5), requires_grad=True)
    head = torch.nn.Linear(H, V)
    dtypes: list[torch.dtype] = []

    def watched_head(chunk: Tensor) -> Tensor:
        logits = head(chunk)
        dtypes.append(logits.dtype)
        return logits

    with torch.autocast("cpu", torch.bfloat16):
        total = loss(chunk_size=4)(hidden, watched_head, target).total
        logits = head(hidden)
    total.backward()  # outside of autocast, as Lightning does
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 6
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), reference(loss, logits, target), rtol=1e-6, atol=0)


def test_soundness() -> None:
    for objective in ("one_hot", "categorical", "independent", "sequential"):
        require_sound(CrossEntropy(), objective)
    require_sound(KullbackLeibler(), "categorical")
    require_sound(KullbackLeibler, "independent")
    with pytest.raises(ValueError, match=r"KullbackLeibler.*one_hot.*point mass.*CrossEntropy"):
        require_sound(KullbackLeibler(), "one_hot")
    with pytest.raises(ValueError, match=r"categorical.*found 'catgorical'"):
        require_sound(CrossEntropy(), "catgorical")


def test_a_divergence_needs_a_teacher() -> None:
    target = random_targets()._replace(teacher=None)
    assert CrossEntropy()(random_logits(), identity, target).total > 0
    with pytest.raises(ValueError, match="CrossEntropy"):
        KullbackLeibler()(random_logits(), identity, target)


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_sizes(loss: type[Loss]) -> None:
    with pytest.raises(ValueError, match="chunk_size=0"):
        loss(chunk_size=0)
    with pytest.raises(ValueError, match=r"\[13, 11\], \[13\] and \[12\]"):
        loss()(random_logits(), identity, random_targets()._replace(weights=torch.ones(12)))
    short = random_targets()
    assert short.teacher is not None
    short = short._replace(teacher=TokenDistribution(short.teacher.probabilities[:5]))
    if loss.needs_teacher:
        with pytest.raises(ValueError, match=r"M = 13, found \[5, 6\]"):
            loss()(random_logits(), identity, short)


@pytest.mark.parametrize(("num_slots", "head_calls"), [(4, 1), (5, 4)])
def test_a_single_chunk_is_projected_once(num_slots: int, head_calls: int) -> None:
    """Two chunks are projected again in the backward pass, which keeps their logits from existing at once."""
    calls = 0

    def head(chunk: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return chunk

    hidden = torch.randn(num_slots, 6, requires_grad=True)
    target = SlotTargets(torch.zeros(num_slots, dtype=torch.long), None, torch.ones(num_slots))
    CrossEntropy(chunk_size=4)(hidden, head, target).total.backward()
    assert calls == head_calls
