"""The queue: every point is trained once, whoever starts, stops, or is killed."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from ptp_lightning.sweeps.attributes import GIVEN_UP, HEARTBEAT, OWNER, POINT, SEED, TRACEBACK
from ptp_lightning.sweeps.queue import STALE_SECONDS, Progress, TrialQueue
from ptp_lightning.sweeps.run import open_study
from ptp_lightning.sweeps.storage import open_storage
from ptp_lightning.sweeps.study import Study
from ptp_lightning.utils.file_lock import LockOwner
from tests.helpers.tiny_study import letters


@pytest.fixture
def location(tmp_path: Path) -> str:
    return str(tmp_path / "study.journal")


@pytest.fixture(params=["journal", "sqlite"])
def any_location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "study.journal") if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


def queue_at(location: str, study: Study, **options: Any) -> TrialQueue:
    """As another process would open it: with a storage object of its own."""
    storage = open_storage(location, create=True)
    return TrialQueue(study, open_study(study, "letters", storage), storage, **options)


def take(queue: TrialQueue) -> str:
    """Take a trial; returns its point."""
    trial = queue.take()
    assert trial is not None
    return trial.suggest_categorical("x", ["a", "b"])


def states(queue: TrialQueue) -> list[str]:
    return [trial.state.name for trial in queue.stored.get_trials(deepcopy=False)]


@pytest.fixture
def dead() -> LockOwner:
    """A process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(ended.pid).create_time()
    ended.wait()
    return LockOwner(LockOwner.current().host, ended.pid, started)


def test_points_are_enqueued_once(location: str) -> None:
    first, second = queue_at(location, letters()), queue_at(location, letters())
    first.fill()
    second.fill()
    assert states(first) == ["WAITING", "WAITING"]


def test_processes_take_different_points_and_no_more_than_there_are(any_location: str) -> None:
    first, second = queue_at(any_location, letters()), queue_at(any_location, letters())
    first.fill()
    assert [take(first), take(second)] == ["a", "b"]
    assert first.take() is None
    assert second.take() is None
    assert first.progress() == Progress(total=2, complete=0, pruned=0, failed=0, running=2)


def test_of_two_trials_of_a_point_the_first_counts(location: str) -> None:
    """Two processes that enqueue the missing points at the same moment."""
    queue = queue_at(location, letters())
    queue.fill()
    again = queue.study.points()[0]
    queue.stored.enqueue_trial(again.parameters, user_attrs={POINT: again.key, "seed": 0})
    assert [take(queue), take(queue)] == ["a", "b"]
    assert queue.take() is None
    assert queue.stored.trials[2].user_attrs[GIVEN_UP] == "another trial has this point"


def abandon(queue: TrialQueue, owner: LockOwner, heartbeat: float = 0.0) -> None:
    """Take a trial in the name of another process, which leaves it running."""
    trial = queue.take()
    assert trial is not None
    trial.suggest_categorical("x", ["a", "b"])
    trial.set_user_attr(OWNER, asdict(owner))
    trial.set_user_attr(HEARTBEAT, heartbeat)


def test_what_a_killed_process_trained_is_enqueued_again_once(any_location: str, dead: LockOwner) -> None:
    """A point that is lost again may be the cause, and is not trained until somebody asks for it."""
    queue = queue_at(any_location, letters(seeds=(0,)))
    queue.fill()
    abandon(queue, dead)
    queue.fill()
    assert states(queue) == ["FAIL", "WAITING", "WAITING"]
    assert take(queue) == "b"
    abandon(queue, dead)
    queue.fill()
    assert states(queue) == ["FAIL", "RUNNING", "FAIL"]
    assert queue.progress() == Progress(total=2, complete=0, pruned=0, failed=1, running=1)
    patient = queue_at(any_location, letters(), retry_failed=True)
    patient.fill()
    assert take(patient) == "a"


def test_a_process_that_lives_keeps_its_trial(location: str) -> None:
    queue = queue_at(location, letters())
    queue.fill()
    assert take(queue) == "a"
    queue_at(location, letters()).fill()
    assert states(queue) == ["RUNNING", "WAITING"]


@pytest.mark.parametrize(("silent_seconds", "state"), [(STALE_SECONDS / 2, "RUNNING"), (STALE_SECONDS * 2, "FAIL")])
def test_other_machines_processes_are_given_up_when_silent(location: str, silent_seconds: float, state: str) -> None:
    queue = queue_at(location, letters())
    queue.fill()
    abandon(queue, LockOwner("elsewhere", 1, 1.0), time.time() - silent_seconds)
    queue.fill()
    assert states(queue)[0] == state


def test_a_trial_that_was_stopped_is_enqueued_again(location: str) -> None:
    queue = queue_at(location, letters())
    queue.fill()
    trial = queue.take()
    assert trial is not None
    queue.give_up(trial, "stopped")
    assert [take(queue), take(queue)] == ["b", "a"]
    assert queue.take() is None


def test_what_ended_is_not_trained_again_but_failures_on_demand(location: str) -> None:
    queue = queue_at(location, letters(seeds=(0, 1)))
    queue.fill()
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        trial = queue.take()
        assert trial is not None
        trial.suggest_categorical("x", ["a", "b"])
        if state == TrialState.FAIL:
            trial.set_user_attr(TRACEBACK, "why")
        trial.report(1.0, 1)
        queue.stored.tell(trial, 1.0 if state == TrialState.COMPLETE else None, state=state)
    again = queue_at(location, letters(seeds=(0, 1)))
    again.fill()
    assert states(again) == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    assert again.progress() == Progress(total=4, complete=1, pruned=1, failed=1, running=0)
    queue_at(location, letters(seeds=(0, 1)), retry_failed=True).fill()
    assert states(again) == ["COMPLETE", "PRUNED", "FAIL", "WAITING", "WAITING"]
    assert again.stored.trials[4].user_attrs[POINT] == again.stored.trials[2].user_attrs[POINT]


def test_points_of_version_0_1_are_recognised(location: str) -> None:
    """A finished one holds its point; a waiting one is replaced, because its parameters have other names."""
    settings = {"predictor.correction.init_args.num_refinement_steps": IntDistribution(1, 2, step=1)}
    queue = queue_at(location, letters(settings=settings))
    for number in (1, 2):
        point = json.dumps([{"predictor.refiner.rounds": number}, 0, None])
        queue.stored.enqueue_trial({"predictor.refiner.rounds": number}, user_attrs={POINT: point, SEED: 0})
    queue.storage.set_trial_state_values(0, TrialState.RUNNING)
    queue.stored.tell(0, 1.0)
    queue.fill()
    assert states(queue) == ["COMPLETE", "WAITING", "WAITING"]
    trial = queue.take()
    assert trial is not None
    assert trial.number == 2
    assert trial.suggest_int("predictor.correction.init_args.num_refinement_steps", 1, 2) == 2
    assert queue.take() is None


def test_more_seeds_add_their_points_alone(location: str) -> None:
    queue_at(location, letters()).fill()
    queue = queue_at(location, letters(seeds=(0, 5)))
    queue.fill()
    assert [trial.user_attrs[SEED] for trial in queue.stored.trials] == [0, 0, 5, 5]


def test_fewer_seeds_leave_the_others_waiting(location: str) -> None:
    queue_at(location, letters(seeds=(0, 5))).fill()
    queue = queue_at(location, letters(seeds=(5,)))
    assert [take(queue), take(queue), queue.take()] == ["a", "b", None]
    assert states(queue) == ["WAITING", "WAITING", "RUNNING", "RUNNING"]


def test_what_a_sampler_chose_is_trained_again_when_it_was_stopped(location: str) -> None:
    study = letters(settings={"lr": FloatDistribution(0.0, 1.0)}, sampler=RandomSampler(), trials=2)
    queue = queue_at(location, study)
    queue.fill()
    values = []
    for _ in range(3):
        trial = queue.take()
        assert trial is not None
        values.append(trial.suggest_float("lr", 0.0, 1.0))
        if len(values) == 1:
            queue.give_up(trial, "stopped")
    assert values[2] == values[0] != values[1]
    assert queue.take() is None


def test_trials_of_somebody_else_are_left_alone(location: str) -> None:
    queue = queue_at(location, letters())
    queue.stored.enqueue_trial({"x": "b"})
    queue.fill()
    assert [take(queue), take(queue), queue.take()] == ["a", "b", None]
    assert states(queue)[0] == "WAITING"
