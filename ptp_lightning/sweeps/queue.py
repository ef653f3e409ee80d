"""TrialQueue: the points of a study as waiting trials, of which every process takes the next one.

Every point is put into the storage before it is trained, so that taking one is a single change of state, which only
one process can make, whatever the storage. A point is trained once: a trial that ended without a result (Ctrl-C, a
process that was killed) is given up, and its point put back.
"""

from __future__ import annotations

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
from ptp_lightning.utils.file_lock import LockOwner

STALE_SECONDS = 900.0  # a trial of another machine that gave no sign of life for so long is given up
UNNAMED_SECONDS = 30.0  # the same while it has no owner yet: its process was killed over naming it
MAX_LOST = 2  # a point whose process was killed as often is left alone: it may be what kills


@dataclass(frozen=True)
class Progress:
    """How many points of a study have come to an end, and how.

    Attributes:
        total: all points.
        complete: with a result.
        pruned: stopped at a validation.
        failed: ended with an error, or lost too often.
        running: being trained now.
    """

    total: int
    complete: int
    pruned: int
    failed: int
    running: int

    @property
    def ended(self) -> int:
        """Points that nobody has to train any more."""
        return self.complete + self.pruned + self.failed


class TrialQueue:
    """The points of a study in a storage.

    Args:
        study: what is to be trained.
        stored: the same in the storage.
        storage: the storage.
        retry_failed: train points that failed once more.
    """

    def __init__(self, study: Study, stored: optuna.Study, storage: BaseStorage, *, retry_failed: bool = False) -> None:
        self.study = study
        self.stored = stored
        self.storage = storage
        self.keys = {point.key for point in study.points()}
        self.study_id = storage.get_study_id_from_name(stored.study_name)
        # Only what had failed before; a retried point that fails again stays failed.
        self.forgiven = {trial.number for trial in self._trials() if trial.state == TrialState.FAIL and retry_failed}

    def fill(self) -> None:
        """Put in the points that no trial holds."""
        self._give_up_lost_ones()
        trials = self._trials()
        held = {trial.user_attrs[POINT] for trial in trials if self._holds(trial)}
        lost = self._times_lost(trials)
        for point in self.study.points():
            if point.key in held or lost[point.key] >= MAX_LOST:
                continue
            parameters = point.parameters if point.ticket is None else self._chosen_before(point, trials)
            self.stored.enqueue_trial(parameters, user_attrs={POINT: point.key, SEED: point.seed})

    def take(self) -> Trial | None:
        """The next trial, which is this process' own from now on; None if none is waiting."""
        trial = self._take_waiting()
        if trial is None:
            self.fill()  # another process may have died meanwhile
            trial = self._take_waiting()
        return trial

    def give_up(self, trial: Trial, reason: str) -> None:
        """End a trial without a result; `fill` will put its point back if nobody else holds it."""
        trial.set_user_attr(GIVEN_UP, reason)
        self.stored.tell(trial, state=TrialState.FAIL)

    def progress(self) -> Progress:
        """Where the study stands."""
        trials = self._trials()
        lost = self._times_lost(trials)
        ends: dict[str, str] = {}
        for trial in trials:
            key = trial.user_attrs[POINT]
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
                ends[key] = trial.state.name
            elif _has_failed(trial) or lost[key] >= MAX_LOST:
                ends.setdefault(key, TrialState.FAIL.name)
        counts = Counter(end for key, end in ends.items() if key in self.keys)
        return Progress(len(self.keys), counts["COMPLETE"], counts["PRUNED"], counts["FAIL"], counts["RUNNING"])

    def _take_waiting(self) -> Trial | None:
        for waiting in self._trials(TrialState.WAITING):
            if waiting.user_attrs[POINT] not in self.keys or not self._start(waiting):
                continue
            trial = Trial(self.stored, waiting._trial_id)
            for name, value in (HEARTBEAT, time.time()), (OWNER, asdict(LockOwner.current())):
                trial.set_user_attr(name, value)
            if not self._is_second(waiting):
                return trial
            self.give_up(trial, "another trial has this point")
        return None

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those that a queue put in, by number; whatever else is in the storage is not ours."""
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False, states=states or None)
        return [trial for trial in trials if POINT in trial.user_attrs]

    def _times_lost(self, trials: list[FrozenTrial]) -> Counter[str]:
        """How often the process that trained a point was killed."""
        return Counter(
            trial.user_attrs[POINT]
            for trial in trials
            if LOST in trial.user_attrs and trial.number not in self.forgiven
        )

    def _holds(self, trial: FrozenTrial) -> bool:
        """Whether a trial's point need not be put in."""
        return trial.state != TrialState.FAIL or (_has_failed(trial) and trial.number not in self.forgiven)

    def _start(self, waiting: FrozenTrial) -> bool:
        try:
            return self.storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:  # another process took it and is done with it
            return False

    def _is_second(self, taken: FrozenTrial) -> bool:
        """Whether a trial with a lower number has the same point: two processes may have put it in at once."""
        return any(
            trial.number < taken.number
            and trial.state != TrialState.FAIL
            and trial.user_attrs[POINT] == taken.user_attrs[POINT]
            for trial in self._trials()
        )

    def _give_up_lost_ones(self) -> None:
        for trial in self._trials(TrialState.RUNNING):
            if _is_lost(trial):
                try:
                    for name, value in (GIVEN_UP, "its process ended"), (LOST, True):
                        self.storage.set_trial_user_attr(trial._trial_id, name, value)
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                except UpdateFinishedTrialError:  # another process was faster
                    pass

    def _chosen_before(self, point: Point, trials: list[FrozenTrial]) -> dict[str, Any]:
        """What a sampler chose for a point whose trial was given up: the same is trained again."""
        chosen = [trial.params for trial in trials if trial.user_attrs[POINT] == point.key and trial.params]
        return chosen[-1] if chosen else {}


def _has_failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and TRACEBACK in trial.user_attrs


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether nobody trains a running trial any more."""
    if OWNER not in trial.user_attrs:
        started = trial.datetime_start
        return started is not None and (datetime.now() - started).total_seconds() > UNNAMED_SECONDS
    owner = LockOwner(**trial.user_attrs[OWNER])
    if owner.host == platform.node():
        return owner.is_dead()
    return time.time() - trial.user_attrs[HEARTBEAT] > STALE_SECONDS
