"""How far a study is: a line for people who wait for it. Reads only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ptp_lightning.sweeps.attributes import HEARTBEAT, HEARTBEAT_STEP, SECONDS, SHARED_STEPS, START_STEP, STEPS
from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.sweeps.queue import TrialQueue, point_of
from ptp_lightning.sweeps.storage import load_stored
from ptp_lightning.sweeps.study import Parameters, Study
from ptp_lightning.sweeps.summary import parameters_of
from ptp_lightning.utils.durations import duration_text


@dataclass(frozen=True)
class Pace:
    """What results until now say about the time of trainings.

    Args:
        study: the study.
        done: trials with a result.
    """

    study: Study
    done: Sequence[FrozenTrial]

    def seconds(self, parameters: Parameters, start_step: int | None = None) -> float:
        """Expected seconds of a training, from a step on; by default from the checkpoint that it will probably find."""
        steps = self.study.steps_of(parameters)
        begin = self._expected_start(steps) if start_step is None else start_step
        return max(steps - begin, 0) * self._seconds_per_step(parameters)

    def _seconds_per_step(self, parameters: Parameters) -> float:
        """Mean over results with the same parameters but the number of steps, or over all."""
        wanted = _without_steps(parameters)
        alike = [trial for trial in self.done if _without_steps(parameters_of(trial)) == wanted]
        return fmean(trial.user_attrs[SECONDS] / trial.user_attrs[STEPS] for trial in alike or self.done)

    def _expected_start(self, steps: int) -> int:
        """The last step that a training shares with the next shorter ones of the study."""
        shorter = [one for one in self.study.budget.all_steps if one < steps]
        shares = [trial.user_attrs.get(SHARED_STEPS, 0) / trial.user_attrs[STEPS] for trial in self.done]
        return round(shorter[-1] * fmean(shares)) if shorter else 0


def status_line(study: Study, name: str, storage: BaseStorage) -> str:
    """How many trainings are done, run, wait and failed, how long the rest takes, and when the next result is expected.

    Raises:
        ValueError: the storage has no study of this name.
    """
    stored = load_stored(name, storage)
    queue = TrialQueue(study, stored, storage)
    progress, states, running = queue.progress(), queue.states(), queue.running()
    waiting = progress.total - progress.ended - len(running)
    counts = f"{progress.complete + progress.pruned} of {progress.total} done, {len(running)} running, "
    counts += f"{waiting} waiting, {progress.failed} failed"
    complete = stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete or waiting + len(running) == 0:
        return counts
    pace = Pace(study, complete)
    parameters = {point.key: point.parameters for point in study.points()}
    left = [_seconds_left(trial, parameters[point_of(trial)], pace) for trial in running]
    ended_or_runs = {point_of(trial) for trial in running} | {
        key for key, state in states.items() if state != TrialState.RUNNING
    }
    seconds = sum(left) + sum(pace.seconds(one) for key, one in parameters.items() if key not in ended_or_runs)
    if not running:
        return f"{counts}; no process works on it, one would take {duration_text(seconds)}"
    ready = datetime.now() + timedelta(seconds=min(left))
    return f"{counts}; {duration_text(seconds / len(running))} left, the next result about {ready:%H:%M}"


def _seconds_left(trial: FrozenTrial, parameters: Parameters, pace: Pace) -> float:
    """Expected time to the end of a running training: by its own pace, and until that is known by that of others."""
    assert trial.datetime_start is not None  # it runs
    begin, now = trial.datetime_start.timestamp(), time.time()
    start, step = (trial.user_attrs.get(name) for name in (START_STEP, HEARTBEAT_STEP))
    if start is None or step is None or step <= start:
        return max(begin + pace.seconds(parameters, start) - now, 0.0)
    beat = trial.user_attrs[HEARTBEAT]
    per_step = (beat - begin) / (step - start)
    return max(beat + (pace.study.steps_of(parameters) - step) * per_step - now, 0.0)


def _without_steps(parameters: Parameters) -> Parameters:
    return {name: value for name, value in parameters.items() if name != STEPS_KEY}
