"""Running: a study from its file to its report, every guard before any work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from ptp_lightning.sweeps.definition import definition_of, require_same
from ptp_lightning.sweeps.prepare import prepare
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.report import write_report
from ptp_lightning.sweeps.storage import JOURNAL, open_storage
from ptp_lightning.sweeps.study import Overrides, Parameters, Study, beside, load_study, study_name
from ptp_lightning.sweeps.training_run import (
    budget_overrides,
    build,
    configured_world_size,
    fit_arguments,
    override_arguments,
    quiet_training,
    read_configuration,
    tokens_per_step,
)
from ptp_lightning.sweeps.worker import Worker, trial_arguments

TENSORBOARD = "tensorboard"
OUTPUTS = "runs/sweeps"
HELPER = "SWEEPS_HELPER"  # the environment variable of processes that another one started to share its study


class Terminated(KeyboardInterrupt):
    """Somebody asked this process alone to end."""


@dataclass(frozen=True)
class Running:
    """A study that is run from the command line.

    Args:
        study_file: what the study is.
        full: its full version, not the quick one.
        output: its folder; by default `runs/sweeps/NAME`.
        storage: journal file or URL; by default a journal in the folder.
        overrides: of the configuration, for all trials.
        retry_failed: train points again whose trials failed.
    """

    study_file: Path
    full: bool
    output: str | None
    storage: str | None
    overrides: Overrides
    retry_failed: bool

    def run(self, trials: int | None, jobs: int) -> None:
        """Train what is not trained yet, at most `trials` points, in `jobs` processes; then report.

        Raises:
            ValueError: something does not fit, see the guards; or trials failed, after all others are trained.
            FileNotFoundError: a file is missing.
            KeyboardInterrupt: somebody stopped it, and the study is as if the trials that were running had not begun.
        """
        signal.signal(signal.SIGTERM, _stop)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        quiet_training()
        study = load_study(self.study_file, full=self.full)
        base = beside(self.study_file, study.base)
        is_helper = HELPER in os.environ
        configuration = self._base_configuration(study, base)
        if not is_helper:
            require_changes_that_exist(study, base, self.overrides)
        storage = open_storage(self.location, create=True)
        stored = open_study(study, self.name, storage)
        require_same(stored, definition_of(study, configuration))
        if not is_helper:
            for preparation in study.prepare:
                prepare(preparation, self.study_file, study.overrides | self.overrides, say)
            parameters = study.covering_points()[0]
            build(trial_arguments(study, base, self.overrides, parameters, study.seeds[0]))
        queue = TrialQueue(study, stored, storage, retry_failed=self.retry_failed and not is_helper)
        if not is_helper:
            queue.fill()
            self._greet(study, queue)
        if jobs > 1:
            self._share(trials, jobs)
        else:
            draw_anew_if_not_first(study, stored, is_helper=is_helper)
            Worker(study, queue, base, self.overrides, self.folder / TENSORBOARD, say).work(trials)
        if not is_helper:
            print(write_report(study, stored, self.folder))
            if failed := queue.progress().failed:
                raise ValueError(f"expected all trials to end well, found {failed} failed: --retry_failed trains them")

    @property
    def name(self) -> str:
        """Of the study in the storage."""
        return study_name(self.study_file, full=self.full)

    @property
    def folder(self) -> Path:
        """Of everything that the study writes."""
        return Path(self.output or default_output(self.name))

    @property
    def location(self) -> str:
        """Of the storage."""
        return self.storage or journal_in(self.folder)

    def _base_configuration(self, study: Study, base: str) -> dict[str, Any]:
        if not Path(base).is_file():
            raise FileNotFoundError(f"expected the configuration of a run at {base}, found none: set base of the study")
        return read_configuration(fit_arguments(base, study.overrides, self.overrides, budget_overrides(study.budget)))

    def _greet(self, study: Study, queue: TrialQueue) -> None:
        progress = queue.progress()
        say(f"{self.name}: {study.title}")
        say(
            f"  {progress.total} trainings of {study.budget.steps:,} steps, {study.budget.tokens:,} tokens; "
            f"{progress.ended} done, {progress.running} running"
        )
        say(f"  storage: {self.location}; curves: tensorboard --logdir {self.folder / TENSORBOARD}")

    def _share(self, trials: int | None, jobs: int) -> None:
        """Let several processes of this command work, each with its share of the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ | {HELPER: "1"}
        command = [sys.executable, "-m", "ptp_lightning", "sweep", "run", str(self.study_file)]
        command += ["--output", str(self.folder)]
        command += ["--storage", self.location, *(["--full"] if self.full else [])]
        command += override_arguments(self.overrides)
        shares = [None] * jobs if trials is None else [(trials + k) // jobs for k in range(jobs)]
        helpers = [
            subprocess.Popen([*command, *([] if share is None else ["--trials", str(share)])], env=environment)
            for share in shares
            if share != 0
        ]
        try:
            ends = [helper.wait() for helper in helpers]
        except KeyboardInterrupt as stop:  # they put their trials back
            for helper in helpers:
                if isinstance(stop, Terminated):  # a terminal's Ctrl-C is told to all of them
                    helper.terminate()
                helper.wait()
            raise
        if any(ends):
            raise ValueError(f"expected all processes of --jobs to end well, found statuses {ends}: see above")


def require_changes_that_exist(study: Study, base: str, more: Overrides) -> None:
    """Read the configuration of every choice of every parameter.

    Raises:
        ValueError: a path does not exist, a value does not fit, or a choice would spend another budget.
    """
    for parameters in study.covering_points():
        configuration = _configuration_of(study, base, more, parameters)
        steps = configuration["trainer"]["max_steps"]
        tokens = steps * tokens_per_step(configuration, configured_world_size(configuration))
        if (steps, tokens) != (study.budget.steps, study.budget.tokens):
            raise ValueError(
                f"expected {study.budget.steps:,} steps and {study.budget.tokens:,} tokens of every trial (budget), "
                f"found {steps:,} and {tokens:,} for {parameters}: set budget, or let the choice change batch_size or "
                "num_windows, too"
            )


def open_study(study: Study, name: str, storage: BaseStorage) -> optuna.Study:
    """The study in the storage; a new one if there is none of this name.

    Raises:
        ValueError: the one that is there was started in the other direction.
    """
    stored = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=study.sampler or RandomSampler(),  # a grid's points say everything
        pruner=study.pruner,
        direction=study.objective.direction,
        load_if_exists=True,
    )
    if stored.direction.name.lower() != study.objective.direction:
        raise ValueError(
            f"expected a study to {study.objective.direction}, found {name!r} to {stored.direction.name.lower()} in "
            "the storage: use another --output or --storage"
        )
    return stored


def draw_anew_if_not_first(study: Study, stored: optuna.Study, *, is_helper: bool) -> None:
    """Give a sampler other draws than its seed's, unless this process begins the study: it would begin it again."""
    has_begun = any(trial.state != TrialState.WAITING for trial in stored.get_trials(deepcopy=False))
    if study.sampler is not None and (is_helper or has_begun):
        study.sampler.reseed_rng()


def default_output(name: str) -> str:
    """Folder of a study where none is named."""
    return f"{OUTPUTS}/{name}"


def journal_in(folder: str | Path) -> str:
    """The storage where none is named."""
    return str(Path(folder) / JOURNAL)


def say(line: str) -> None:
    """Show a line now, also where the output is a file."""
    print(line, flush=True)


def _configuration_of(study: Study, base: str, more: Overrides, parameters: Parameters) -> dict[str, Any]:
    try:
        return read_configuration(trial_arguments(study, base, more, parameters, study.seeds[0]))
    except ValueError as error:
        raise ValueError(f"the choice {parameters} is none of {base}: {error}") from error


def _stop(*_: object) -> NoReturn:
    """A polite request to end is answered like Ctrl-C, also while Lightning does not listen."""
    raise Terminated
