"""Trainings that begin with a checkpoint of another one equal those from scratch, bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from optuna.trial import FrozenTrial, TrialState

from ptp_lightning.sweeps.attributes import (
    CPU_SECONDS,
    METRICS,
    PREFIX_COUNTS,
    SECONDS,
    SHARED_STEPS,
    START_STEP,
    STEPS,
    TOKENS,
    TRAINING_SECONDS,
)
from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.sweeps.checkpoints import TrialCheckpoints
from ptp_lightning.sweeps.training_run import Result, TrainingRuns
from ptp_lightning.sweeps.trial_callbacks import PruneAtValidation, TrainingClock
from ptp_lightning.sweeps.worker import Worker
from ptp_lightning.training.distributed.termination import TerminateTogether
from ptp_lightning.training.modules.training_module import TrainingModule
from ptp_lightning.training.optimization import OptimizerSettings
from tests.helpers.tiny_study import METRIC, TOKENS_PER_STEP, plain_study, worker_for

BUDGETS = [4, 8, 12]
DECAY_STARTS = [2, 4, 6]
OPTIMIZER = "model.init_args.optimizer"
OVERRIDES = plain_study()["overrides"] | {f"{OPTIMIZER}.decay_fraction": 0.5, f"{OPTIMIZER}.warmup_steps": 2}
DIVERGENCE = "val/kl/position_03"
ONE = {"objective": {"categorical": {}}}


def budget(*steps: int) -> dict[str, Any]:
    return {"steps": list(steps), "tokens": max(steps) * TOKENS_PER_STEP, "validations": 1}


def worker(folder: Path, *steps: int, **changes: Any) -> Worker:
    folder.mkdir(exist_ok=True)
    return worker_for(
        folder, [], **({"budget": budget(*steps or [1]), "variants": ONE, "overrides": OVERRIDES} | changes)
    )


def by_steps(of: Worker) -> dict[int, FrozenTrial]:
    complete = of.queue.stored.get_trials(states=(TrialState.COMPLETE,))
    return {trial.params[STEPS_KEY]: trial for trial in complete}


def results(trial: FrozenTrial) -> Mapping[str, Any]:
    return {name: trial.user_attrs[name] for name in (METRICS, PREFIX_COUNTS, STEPS, TOKENS)}


def files(of: Worker) -> list[str]:
    return sorted(path.name for path in of.checkpoints.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Results of the longest training alone."""
    alone = worker(tmp_path_factory.mktemp("alone"), BUDGETS[-1])
    alone.work(None)
    (trial,) = by_steps(alone).values()
    assert trial.user_attrs[START_STEP] == 0
    return results(trial)


def test_a_long_training_begins_with_the_first_steps_of_a_short_one(
    tmp_path: Path, from_scratch: Mapping[str, Any]
) -> None:
    several = worker(tmp_path, *BUDGETS)
    assert several.work(None) == 3
    trials = by_steps(several)
    assert [trials[steps].user_attrs[SHARED_STEPS] for steps in BUDGETS] == DECAY_STARTS
    assert [trials[steps].user_attrs[START_STEP] for steps in BUDGETS] == [0, *DECAY_STARTS[:-1]]
    assert results(trials[BUDGETS[-1]]) == from_scratch
    metrics = [trial.user_attrs[METRICS][DIVERGENCE] for trial in trials.values()]
    assert len(set(metrics)) == 3  # or the comparison would say nothing
    assert files(several) == [f"shared_step_{DECAY_STARTS[-1]:06d}.ckpt"]
    for name in (TRAINING_SECONDS, CPU_SECONDS):  # with those of the shared steps
        assert trials[BUDGETS[-1]].user_attrs[name] > 0
    assert trials[BUDGETS[-1]].user_attrs[SECONDS] > trials[BUDGETS[-1]].user_attrs[TRAINING_SECONDS]


@pytest.mark.parametrize(
    ("total_steps", "chosen"),
    [
        pytest.param(2, None, id="both begin after its decay has begun"),
        pytest.param(4, "shared_step_000002.ckpt", id="the first of its steps"),
        pytest.param(8, "of_8_step_000005.ckpt", id="its own, which is later"),
        pytest.param(14, "shared_step_000006.ckpt", id="the later one"),
    ],
)
def test_a_training_begins_with_the_most_steps_that_are_its_own(
    total_steps: int, chosen: str | None, tmp_path: Path
) -> None:
    for name in ("shared_step_000002", "shared_step_000006", "of_8_step_000005", "of_80_step_000007"):
        (tmp_path / f"{name}.ckpt").touch()
    checkpoints = TrialCheckpoints(tmp_path, total_steps, serves_others=True)
    start = checkpoints.start(Half(OptimizerSettings(decay_fraction=0.5)))
    assert start == (None if chosen is None else tmp_path / chosen)


class Half(TrainingModule):
    """A module that is not trained."""

    @property
    def networks(self) -> list[Any]:
        return []


def test_time_counts_from_the_first_step_of_the_earlier_process() -> None:
    clock = TrainingClock()
    clock.load_state_dict({"seconds": 100.0, "cpu_seconds": 50.0})
    clock.on_train_start(Trainer(logger=False), Half(OptimizerSettings()))
    state = clock.state_dict()
    assert 100 < state["seconds"] < 101
    assert 50 < state["cpu_seconds"] < 51


class StopAt(Callback):
    """Stops a training after a step, as SIGTERM would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            (end,) = (one for one in trainer.callbacks if isinstance(one, TerminateTogether))  # pyright: ignore[reportAttributeAccessIssue]
            end._received = 15


def stop_at(step: int, of: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker's trainings stop after a step."""
    run = of.runs.run
    monkeypatch.setattr(
        of.runs, "run", lambda arguments, callbacks, *more: run(arguments, [*callbacks, StopAt(step)], *more)
    )


def test_a_stopped_training_goes_on_where_it_was(
    tmp_path: Path, from_scratch: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = worker(tmp_path, BUDGETS[-1])
    stop_at(9, stopped, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        stopped.work(None)
    assert files(stopped) == ["of_12_step_000009.ckpt", "shared_step_000006.ckpt"]
    again = worker(tmp_path, BUDGETS[-1])
    again.work(None)
    (trial,) = by_steps(again).values()
    assert trial.user_attrs[START_STEP] == 9
    assert results(trial) == from_scratch
    assert files(again) == ["shared_step_000006.ckpt"]


class KilledError(Exception):
    """What happens to a process without a chance to write anything."""


class KillAt(StopAt):
    """Ends a training after a step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def train(folder: Path, of: Worker, pruning: PruneAtValidation, *callbacks: Callback) -> Result:
    """One training of the worker's first point, without its queue."""
    arguments = of.arguments(of.study.points()[0].parameters, seed=0)
    checkpoints = TrialCheckpoints(folder, BUDGETS[-1], serves_others=False)
    return TrainingRuns().run([*arguments, "--trainer.logger=false"], [pruning, *callbacks], {}, checkpoints)


def test_a_killed_training_goes_on_from_its_last_checkpoint_with_its_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a study with one budget and several validations, which a pruner may need."""
    monkeypatch.setattr("ptp_lightning.sweeps.checkpoints.SAVE_SECONDS", -1.0)  # after every step
    steps = {"steps": BUDGETS[-1], "tokens": BUDGETS[-1] * TOKENS_PER_STEP, "validations": 3}
    whole, reports = tmp_path / "whole", []
    of = worker(tmp_path / "study", budget=steps)

    def pruning() -> PruneAtValidation:
        trial = of.queue.stored.ask()
        monkeypatch.setattr(trial, "report", lambda value, step: reports.append((step, value)))
        return PruneAtValidation(METRIC, trial)

    expected = train(whole, of, pruning())
    reported, reports[:] = [*reports], []
    with pytest.raises(KilledError):
        train(tmp_path / "killed", of, pruning(), KillAt(7))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["of_12_step_000006.ckpt"]
    assert reports == reported[:1]
    reports.clear()
    (left,) = (tmp_path / "killed").iterdir()
    content = torch.load(left, weights_only=True)
    content["callbacks"]["TrainingClock"] = {"seconds": 1000.0, "cpu_seconds": 2000.0}
    torch.save(content, left)
    found = train(tmp_path / "killed", of, pruning())
    assert reports == reported
    assert (found.metrics, found.prefix_counts) == (expected.metrics, expected.prefix_counts)
    # None after the last step, with which a training could begin that would end before its validation.
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["of_12_step_000011.ckpt"]
    assert 1000 < found.training_seconds < found.seconds < 1100
    assert 2000 < found.cpu_seconds < 2100
