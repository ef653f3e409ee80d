"""StudyRunner: runs a study from its file to its report; all checks come before the first training."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from ptp_lightning.sweeps.definition import definition_of, require_same
from ptp_lightning.sweeps.names import budget_text
from ptp_lightning.sweeps.prepare import prepare
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.report import write_report
from ptp_lightning.sweeps.storage import JOURNAL, open_storage
from ptp_lightning.sweeps.study import Overrides, Parameters, Study, load_study, path_from_study, study_name
from ptp_lightning.sweeps.training_run import (
    budget_overrides,
    configured_world_size,
    fit_arguments,
    override_arguments,
    read_configuration,
    require_logged,
    silence_training_logs,
    tokens_per_step,
)
from ptp_lightning.sweeps.worker import TENSORBOARD, Worker, trial_arguments
from ptp_lightning.utils.passwords import without_passwords
from ptp_lightning.utils.user_errors import TerminatedError

OUTPUTS = "runs/sweeps"
JOB = "SWEEPS_JOB"  # environment variable of the processes that --jobs starts
STORAGE = "SWEEPS_STORAGE"  # their storage, which is no option because all users see options, and the password in it


@dataclass(frozen=True)
class StudyRunner:
    """A study that is run from the command line.

    Args:
        study_file: the study's file.
        full: the full version, not the quick one.
        output: folder of the study; by default `runs/sweeps/NAME`.
        storage: journal file or URL; by default a journal in the folder.
        overrides: of the configuration, for all trials.
        retry_failed: train failed points again.
    """

    study_file: Path
    full: bool
    output: str | None
    storage: str | None
    overrides: Overrides
    retry_failed: bool

    def run(self, trials: int | None, jobs: int) -> None:
        """Train untrained points, at most `trials`, in `jobs` processes; then write the report.

        Raises:
            ValueError: the study is wrong; or trials failed, after all others are trained.
            FileNotFoundError: a file is missing.
            KeyboardInterrupt: on Ctrl-C or SIGTERM, after the running trials are enqueued again.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        silence_training_logs()
        study = load_study(self.study_file, full=self.full)
        base = path_from_study(self.study_file, study.base)
        is_job = JOB in os.environ
        configuration = self._base_configuration(study, base)
        if not is_job:
            validate_choices(study, base, self.overrides)
        storage = open_storage(self.location, create=True)
        stored = open_study(study, self.name, storage)
        require_same(stored, definition_of(study, configuration))
        if not is_job:
            for preparation in study.prepare:
                prepare(preparation, self.study_file, study.overrides | self.overrides, log)
            parameters = study.covering_points()[0]
            require_logged(
                study.metric_of(parameters),
                trial_arguments(study, base, self.overrides, parameters, study.seeds[0]),
            )
        queue = TrialQueue(study, stored, storage, retry_failed=self.retry_failed and not is_job)
        if not is_job:
            queue.fill()
            self._greet(study, queue)
        if jobs > 1:
            self._run_jobs(trials, jobs)
        else:
            reseed_unless_first(study, stored, is_job=is_job)
            Worker(study, queue, base, self.overrides, self.folder, log).work(trials)
        if not is_job:
            print(write_report(study, stored, self.folder))
            if failed := queue.progress().failed:
                raise ValueError(f"expected all trials to succeed, found {failed} failed: --retry_failed repeats them")

    @property
    def name(self) -> str:
        """Name of the study in the storage."""
        return study_name(self.study_file, full=self.full)

    @property
    def folder(self) -> Path:
        """Folder of the study's files."""
        return Path(self.output or default_output(self.name))

    @property
    def location(self) -> str:
        """Path or URL of the storage."""
        return self.storage or os.environ.get(STORAGE) or journal_in(self.folder)

    def _base_configuration(self, study: Study, base: str) -> dict[str, Any]:
        if not Path(base).is_file():
            raise FileNotFoundError(f"expected the configuration of a run at {base}, found none: set base of the study")
        return read_configuration(
            fit_arguments(base, study.overrides, self.overrides, budget_overrides(study.budget, study.budget.largest))
        )

    def _greet(self, study: Study, queue: TrialQueue) -> None:
        progress = queue.progress()
        log(f"{self.name}: {study.title}")
        log(
            f"  {progress.total} trainings of {budget_text(study.budget)}; {progress.ended} done, "
            f"{progress.running} running"
        )
        log(f"  storage: {without_passwords(self.location)}; curves: tensorboard --logdir {self.folder / TENSORBOARD}")

    def _run_jobs(self, trials: int | None, jobs: int) -> None:
        """Start processes of this command that share the study and the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ | {JOB: "1", STORAGE: self.location}
        command = [sys.executable, "-m", "ptp_lightning", "sweep", "run", str(self.study_file)]
        command += ["--output", str(self.folder)]
        command += ["--full"] if self.full else []
        command += override_arguments(self.overrides)
        shares = [None] * jobs if trials is None else [(trials + k) // jobs for k in range(jobs)]
        processes = [
            subprocess.Popen([*command, *([] if share is None else ["--trials", str(share)])], env=environment)
            for share in shares
            if share != 0
        ]
        try:
            ends = [process.wait() for process in processes]
        except KeyboardInterrupt as stop:  # they enqueue their trials again
            for process in processes:
                if isinstance(stop, TerminatedError):  # a terminal sends Ctrl-C to all of them
                    process.terminate()
                process.wait()
            raise
        if any(ends):
            raise ValueError(f"expected all processes of --jobs to succeed, found exit statuses {ends}: see above")


def validate_choices(study: Study, base: str, overrides: Overrides) -> None:
    """Parse the configuration of every choice of every parameter.

    Raises:
        ValueError: a key does not exist, a value is refused, or a choice has another budget.
    """
    for parameters in study.covering_points():
        configuration = _configuration_of(study, base, overrides, parameters)
        steps = configuration["trainer"]["max_steps"]
        tokens = steps * tokens_per_step(configuration, configured_world_size(configuration))
        expected = study.steps_of(parameters)
        if (steps, tokens) != (expected, study.budget.tokens_of(expected)):
            raise ValueError(
                f"expected {expected:,} steps and {study.budget.tokens_of(expected):,} tokens (budget), "
                f"found {steps:,} and {tokens:,} for {parameters}: set budget, or let the choice change batch_size or "
                "num_windows too"
            )


def open_study(study: Study, name: str, storage: BaseStorage) -> optuna.Study:
    """The study of this name in the storage, created if it is missing.

    Raises:
        ValueError: the stored study has the other direction.
    """
    stored = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=study.sampler or RandomSampler(),  # unused: a grid's points are complete
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


def reseed_unless_first(study: Study, stored: optuna.Study, *, is_job: bool) -> None:
    """Reseed the sampler in all processes but the first, which would otherwise repeat its draws."""
    has_begun = any(trial.state != TrialState.WAITING for trial in stored.get_trials(deepcopy=False))
    if study.sampler is not None and (is_job or has_begun):
        study.sampler.reseed_rng()


def default_output(name: str) -> str:
    """Default folder of a study."""
    return f"{OUTPUTS}/{name}"


def journal_in(folder: str | Path) -> str:
    """Default storage of a study."""
    return str(Path(folder) / JOURNAL)


def log(line: str) -> None:
    """Print a line without buffering."""
    print(line, flush=True)


def _configuration_of(study: Study, base: str, overrides: Overrides, parameters: Parameters) -> dict[str, Any]:
    try:
        return read_configuration(trial_arguments(study, base, overrides, parameters, study.seeds[0]))
    except ValueError as error:
        raise ValueError(f"the choice {parameters} does not fit {base}: {error}") from error
