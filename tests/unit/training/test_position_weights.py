"""Position weights in DistillationModule: both losses, against loops over windows and slots."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import (
    AcceptedLengthWeights,
    BinaryCrossEntropy,
    CrossEntropy,
    GeometricWeights,
    JensenShannon,
    KullbackLeibler,
    Loss,
    LossSum,
    PositionWeights,
    ReverseKullbackLeibler,
    TotalVariation,
    UniformWeights,
)
from ptp_lightning.models.slots.objectives import CategoricalObjective, Objective, OneHotObjective
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSample
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import PAIRS, make_module, make_trainer, record_losses

GRID = 500
KINDS: list[PositionWeights] = [UniformWeights(), GeometricWeights(0.5), AcceptedLengthWeights()]
every_kind = pytest.mark.parametrize("weights", KINDS, ids=lambda w: type(w).__name__)
TRAINED: list[tuple[Objective, Loss]] = [
    (OneHotObjective(), BinaryCrossEntropy()),
    (OneHotObjective(), CrossEntropy()),
    (CategoricalObjective(), CrossEntropy()),
    (CategoricalObjective(), KullbackLeibler()),
    (CategoricalObjective(), ReverseKullbackLeibler()),
    (CategoricalObjective(), JensenShannon()),
    (CategoricalObjective(), TotalVariation()),
]


def named(value: object) -> str:
    """For pytest: a number, the class of a value, or those of a pair."""
    if isinstance(value, int):
        return str(value)
    return "-".join(type(part).__name__ for part in (value if isinstance(value, tuple) else (value,)))


def windows(module: DistillationModule) -> tuple[WindowSample, Tensor]:
    """A sample with masked slots, and hidden states `[B, N, L - 1, H]` of slots some of which are correct."""
    batch = next(iter(tiny_data().train_dataloader()))
    context = module._encode(batch)
    generator = torch.Generator().manual_seed(0)
    sample = TeacherWindows().sample(module.predictor, context, generator)
    mask = sample.mask.clone()
    mask[0, 0, 2:] = False
    mask[1, 1] = False
    head = module.predictor.base_model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    towards = head.weight[sample.token_ids[..., 1:]]
    hidden = 2 * towards + 0.5 * torch.randn(towards.shape, generator=generator)
    return sample._replace(mask=mask), hidden.detach()


def nats_by_slot(module: DistillationModule, sample: WindowSample, hidden: Tensor) -> Tensor:
    """The loss of every slot by itself: `[B, N, L - 1]`."""
    nats = torch.zeros(hidden.shape[:3], dtype=torch.float64)
    for position in torch.cartesian_prod(*map(torch.arange, hidden.shape[:3])).tolist():
        only = torch.zeros_like(sample.mask)
        only[position[0], position[1], position[2] + 1] = True
        single = sample._replace(mask=only)
        nats[tuple(position)] = float(module._slot_loss(hidden, single, module.predictor.sampler()).total)
    return nats


def counted_correct(module: DistillationModule, sample: WindowSample, hidden: Tensor) -> Tensor:
    """The share of a grid of u in each token's interval for which the slot drafts it: `[B, N, L - 1]`."""
    config = module.predictor.config
    logits = module.predictor.logits(hidden).detach()
    if isinstance(config.objective, OneHotObjective):
        return logits.softmax(-1).gather(-1, sample.token_ids[..., 1:, None]).squeeze(-1).double()
    lower, upper = token_interval(sample.teacher.materialize(), sample.token_ids)
    correct = torch.zeros(hidden.shape[:3], dtype=torch.float64)
    for step in range(GRID):
        u = (lower + (step + 0.5) / GRID * (upper - lower))[..., 1:]
        correct += config.objective.tokens_from_logits(logits, u, config.sampling) == sample.token_ids[..., 1:]
    return correct / GRID


def weights_by_hand(weights: PositionWeights, mask: Tensor, correct: Tensor) -> Tensor:
    by_hand = torch.zeros(mask.shape, dtype=torch.float64)
    for row, window, slot in mask.nonzero().tolist():
        if isinstance(weights, AcceptedLengthWeights):
            by_hand[row, window, slot] = float(correct[row, window, :slot].prod())
        else:
            by_hand[row, window, slot] = weights.decay**slot if isinstance(weights, GeometricWeights) else 1
    return by_hand


@one_in(2, pair=PAIRS, weights=KINDS, chunk_size=[5, 1024], ids=named)
def test_the_loss_is_the_weighted_sum(pair: tuple[Objective, Loss], weights: PositionWeights, chunk_size: int) -> None:
    objective, loss = pair
    module, weighing = (
        make_module(objective=objective, loss=type(loss)(chunk_size=chunk_size), position_weights=each)
        for each in (UniformWeights(), weights)
    )
    sample, hidden = windows(module)
    total, count = weighing._slot_loss(hidden, sample, module.predictor.sampler())
    correct = counted_correct(module, sample, hidden)
    expected = weights_by_hand(weights, sample.mask[..., 1:], correct)
    assert float(count) == pytest.approx(float(expected.sum()), abs=0.05 if weights.needs_correct_probability else 1e-6)
    nats = nats_by_slot(module, sample, hidden)
    assert float(total) == pytest.approx(
        float((nats * expected).sum()), rel=0.01 if weights.needs_correct_probability else 1e-5
    )
    if weights.needs_correct_probability:  # else this test would not tell it from the others
        assert float(expected[..., 1:].max()) > 0.1 and float(expected.sum()) < sample.mask[..., 1:].sum() - 1


def test_weights_get_no_gradient() -> None:
    """The gradient is that of the losses with the weights as constants."""
    module = make_module()
    sample, hidden = windows(module)
    weighted = hidden.clone().requires_grad_()
    weighing = make_module(position_weights=AcceptedLengthWeights())
    weighing._slot_loss(weighted, sample, module.predictor.sampler()).total.backward()
    plain = hidden.clone().requires_grad_()
    module._slot_loss(plain, sample, module.predictor.sampler()).total.backward()
    assert weighted.grad is not None and plain.grad is not None
    mask = sample.mask[..., 1:]
    ratio = weighted.grad[mask] / plain.grad[mask]  # [kept, H]: one number per slot, its weight
    lowest, highest = ratio.min(-1).values, ratio.max(-1).values
    torch.testing.assert_close(lowest, highest, rtol=1e-3, atol=1e-6)
    assert (highest <= 1 + 1e-3).all() and (highest < 0.5).any()


@every_kind
def test_both_losses_are_means_of_their_own(tmp_path: Path, weights: PositionWeights) -> None:
    """The refined and the first-pass loss have weights of their own, and each divides by their sum."""
    module = make_module()
    module.position_weights = weights
    seen: dict[str, LossSum] = {}
    refined_loss, first_pass_loss = module._corrected_loss, module._first_pass_loss
    module._corrected_loss = lambda *arguments: seen.setdefault("refined", refined_loss(*arguments))
    module._first_pass_loss = lambda *arguments: seen.setdefault("first pass", first_pass_loss(*arguments))
    losses = record_losses(module)
    trainer = make_trainer(tmp_path, max_steps=1)
    with torch.no_grad():
        assert module.predictor.refiner is not None
        module.predictor.refiner.out.weight.normal_()  # else both say the same
    trainer.fit(module, datamodule=tiny_data())
    means = {name: float((sums.total / sums.count).detach()) for name, sums in seen.items()}
    assert float(trainer.callback_metrics["train/loss_nats"]) == pytest.approx(means["refined"], rel=1e-5)
    assert float(trainer.callback_metrics["train/first_pass_loss_nats"]) == pytest.approx(means["first pass"], rel=1e-5)
    assert losses == [pytest.approx(means["refined"] + 0.5 * means["first pass"], rel=1e-5)]
    assert (seen["refined"].count != seen["first pass"].count) == weights.needs_correct_probability


@every_kind
def test_ranks_share_one_mean(monkeypatch: pytest.MonkeyPatch, weights: PositionWeights) -> None:
    """The mean of what two ranks minimise is the weighted mean over the windows of both."""
    module = make_module(position_weights=weights)
    sums = [[LossSum(torch.tensor(3.0), torch.tensor(0.25)), LossSum(torch.tensor(4.0), torch.tensor(0.5))]]
    sums.append([LossSum(torch.tensor(0.0), torch.tensor(0.0)), LossSum(torch.tensor(0.0), torch.tensor(0.0))])
    means = torch.tensor([[1.5, 2.0], [0.125, 0.25]])  # of the totals and of the counts over both ranks
    module._trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        strategy=SimpleNamespace(reduce=lambda sums, reduce_op: means),
        global_rank=0,
        global_step=0,
        estimated_stepping_batches=1,
        accumulate_grad_batches=1,
    )
    module.end_of_text = None
    module.log = lambda *_, **__: None
    batch: PackedBatch = next(iter(tiny_data().train_dataloader()))
    local = []
    for refined, first_pass in sums:
        monkeypatch.setattr(module, "_corrected_loss", lambda *_, loss=refined: loss)
        monkeypatch.setattr(module, "_first_pass_loss", lambda *_, loss=first_pass: loss)
        local.append(float(module.training_step(batch, 0)))
    assert sum(local) / 2 == pytest.approx(3 / 0.25 + 0.5 * 4 / 0.5)


@one_in(3, pair=TRAINED, weights=KINDS, ids=named)
def test_every_loss_trains_with_every_weight(
    tmp_path: Path, pair: tuple[Objective, Loss], weights: PositionWeights
) -> None:
    objective, loss = pair
    module = make_module(objective=objective, loss=loss, position_weights=weights)
    losses = record_losses(module)
    make_trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=tiny_data())
    assert len(losses) == 2 and all(0 < value < 1e3 for value in losses)


def test_teachers_of_all_slots_are_not_copied() -> None:
    """The measure reads the teacher of the slots it is asked for, in the numbering of the mask."""
    module = make_module(loss=KullbackLeibler(chunk_size=4), position_weights=AcceptedLengthWeights())
    sample, hidden = windows(module)
    seen: list[TokenDistribution] = []
    objective = module.predictor.config.objective
    original = type(objective).correct_probability

    def watch(self: Objective, logits: Tensor, tokens: Tensor, teacher: TokenDistribution, sampling: object) -> Tensor:
        seen.append(teacher)
        return original(self, logits, tokens, teacher, sampling)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(objective), "correct_probability", watch)
        module._slot_loss(hidden, sample, module.predictor.sampler())
    kept = sample.teacher.materialize().probabilities[..., 1:, :][sample.mask[..., 1:]]
    assert torch.equal(torch.cat([teacher.probabilities for teacher in seen]), kept)
    assert max(len(teacher.probabilities) for teacher in seen) == 4
