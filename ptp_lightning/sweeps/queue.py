"""TrialQueue: the points of a study as waiting trials in a storage, shared by several processes.

Every point is enqueued before it is trained. A process takes a trial by one change of its state, which the storage
grants to one process only. A trial that ends without a result (Ctrl-C, a killed process) is given up and its point is
enqueued again, so that each point is trained once.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from ptp_lightning.sweeps.attributes import GIVEN_UP, HEARTBEAT, LOST, OWNER, POINT, SEED, TRACEBACK
from ptp_lightning.sweeps.study import Point, Study
from ptp_lightning.sweeps.summary import parameters_of
from ptp_lightning.utils.file_lock import LockOwner
from ptp_lightning.utils.renamed_keys import current_key

STALE_SECONDS = 900.0  # without a heartbeat, after which a trial of another machine is given up
UNNAMED_SECONDS = 30.0  # the same for a trial without an owner, whose process died before it wrote its name
MAX_LOST = 2  # killed processes, after which a point counts as failed: it may be the cause


@dataclass(frozen=True)
class Progress:
    """Number of points of a study by state.

    Attributes:
        total: all points.
        complete: with a result.
        pruned: stopped by the pruner.
        failed: with an error, or lost `MAX_LOST` times.
        running: being trained now.
    """

    total: int
    complete: int
    pruned: int
    failed: int
    running: int

    @property
    def ended(self) -> int:
        """Points that need no more training."""
        return self.complete + self.pruned + self.failed


class TrialQueue:
    """The points of a study in a storage.

    Args:
        study: the study.
        stored: the study in the storage.
        storage: the storage.
        retry_failed: enqueue failed points once more.
    """

    def __init__(self, study: Study, stored: optuna.Study, storage: BaseStorage, *, retry_failed: bool = False) -> None:
        self.study = study
        self.stored = stored
        self.storage = storage
        self.order = {
            point.key: (study.steps_of(point.parameters), order) for order, point in enumerate(study.points())
        }
        self.study_id = storage.get_study_id_from_name(stored.study_name)
        # Trials that had failed before; a retried point that fails again stays failed.
        self.retried = {trial.number for trial in self._trials() if trial.state == TrialState.FAIL and retry_failed}

    def fill(self) -> None:
        """Enqueue the points that have no trial."""
        self._give_up_lost_trials()
        trials = self._trials()
        held = {point_of(trial) for trial in trials if self._holds(trial)}
        lost = self._times_lost(trials)
        for point in self.study.points():
            if point.key in held or lost[point.key] >= MAX_LOST:
                continue
            parameters = point.parameters if point.ticket is None else self._chosen_before(point, trials)
            self.stored.enqueue_trial(parameters, user_attrs={POINT: point.key, SEED: point.seed})

    def take(self) -> Trial | None:
        """The next trial, now owned by this process; None if none is waiting."""
        trial = self._take_waiting()
        if trial is None:
            self.fill()  # a process may have died meanwhile
            trial = self._take_waiting()
        return trial

    def give_up(self, trial: Trial, reason: str) -> None:
        """End a trial without a result; `fill` enqueues its point again."""
        trial.set_user_attr(GIVEN_UP, reason)
        self.stored.tell(trial, state=TrialState.FAIL)

    def progress(self) -> Progress:
        """Number of points by state."""
        counts = Counter(self.states().values())
        complete, pruned = counts[TrialState.COMPLETE], counts[TrialState.PRUNED]
        return Progress(len(self.order), complete, pruned, counts[TrialState.FAIL], counts[TrialState.RUNNING])

    def states(self) -> dict[str, TrialState]:
        """The state of each point that is not waiting, by its key."""
        trials = self._trials()
        lost = self._times_lost(trials)
        states: dict[str, TrialState] = {}
        for trial in trials:
            key = point_of(trial)
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
                states[key] = trial.state
            elif _has_failed(trial) or lost[key] >= MAX_LOST:
                states.setdefault(key, TrialState.FAIL)
        return {key: state for key, state in states.items() if key in self.order}

    def running(self) -> list[FrozenTrial]:
        """The trials of this study's points that a living process trains."""
        trials = self._trials(TrialState.RUNNING)
        return [trial for trial in trials if point_of(trial) in self.order and not _is_lost(trial)]

    def _take_waiting(self) -> Trial | None:
        for waiting in self._in_order(self._trials(TrialState.WAITING)):
            if not self._start(waiting):
                continue
            trial = Trial(self.stored, waiting._trial_id)
            for name, value in (HEARTBEAT, time.time()), (OWNER, asdict(LockOwner.current())):
                trial.set_user_attr(name, value)
            if not self._is_duplicate(waiting):
                return trial
            self.give_up(trial, "another trial has this point")
        return None

    def _in_order(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Trials of the study's points in its order, though a stopped trial is enqueued again after all others.

        Among those of equally many steps, points that killed processes left come last.
        """
        lost = self._times_lost(self._trials(TrialState.FAIL))

        def sort_key(trial: FrozenTrial) -> tuple[int, int, int]:
            steps, order = self.order[point_of(trial)]
            return steps, lost[point_of(trial)], order

        return sorted((trial for trial in trials if point_of(trial) in self.order), key=sort_key)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials that a queue of this version enqueued or that ended, by number; others in the storage are ignored."""
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False, states=states or None)
        return [trial for trial in trials if POINT in trial.user_attrs and not _is_outdated(trial)]

    def _times_lost(self, trials: list[FrozenTrial]) -> Counter[str]:
        """By point, how often the process that trained it was killed."""
        return Counter(
            point_of(trial) for trial in trials if LOST in trial.user_attrs and trial.number not in self.retried
        )

    def _holds(self, trial: FrozenTrial) -> bool:
        """Whether a trial's point need not be enqueued."""
        return trial.state != TrialState.FAIL or (_has_failed(trial) and trial.number not in self.retried)

    def _start(self, waiting: FrozenTrial) -> bool:
        try:
            return self.storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:  # another process took and finished it
            return False

    def _is_duplicate(self, taken: FrozenTrial) -> bool:
        """Whether a trial with a lower number has the same point: two processes may have enqueued it at once."""
        return any(
            trial.number < taken.number and trial.state != TrialState.FAIL and point_of(trial) == point_of(taken)
            for trial in self._trials()
        )

    def _give_up_lost_trials(self) -> None:
        for trial in self._trials(TrialState.RUNNING):
            if _is_lost(trial):
                try:
                    for name, value in (GIVEN_UP, "its process ended"), (LOST, True):
                        self.storage.set_trial_user_attr(trial._trial_id, name, value)
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                except UpdateFinishedTrialError:  # another process was faster
                    pass

    def _chosen_before(self, point: Point, trials: list[FrozenTrial]) -> dict[str, Any]:
        """Parameters that a sampler chose for an earlier trial of this point, to train the same again."""
        chosen = [parameters_of(trial) for trial in trials if point_of(trial) == point.key and trial.params]
        return chosen[-1] if chosen else {}


def point_of(trial: FrozenTrial) -> str:
    """The key of a trial's point, with the parameter names of today."""
    parameters, seed, ticket = json.loads(trial.user_attrs[POINT])
    return Point({current_key(name): value for name, value in parameters.items()}, seed, ticket).key


def _is_outdated(trial: FrozenTrial) -> bool:
    """Whether a trial waits with parameter names of version 0.1: its values would not be found under those of today."""
    return trial.state == TrialState.WAITING and point_of(trial) != trial.user_attrs[POINT]


def _has_failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and TRACEBACK in trial.user_attrs


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial has died."""
    if OWNER not in trial.user_attrs:
        started = trial.datetime_start
        return started is not None and (datetime.now() - started).total_seconds() > UNNAMED_SECONDS
    owner = LockOwner(**trial.user_attrs[OWNER])
    if owner.host == platform.node():
        return owner.is_dead()
    return time.time() - trial.user_attrs[HEARTBEAT] > STALE_SECONDS
