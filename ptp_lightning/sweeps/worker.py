"""Worker: takes trials from the queue, trains them and records their results."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from ptp_lightning.sweeps.attributes import (
    ACCURACY,
    COMMAND,
    CPU_SECONDS,
    DEFINITION,
    LOG_DIR,
    METRICS,
    PREFIX_COUNTS,
    SECONDS,
    SEED,
    SHARED_STEPS,
    STEPS,
    TOKENS,
    TRACEBACK,
    TRAINING_SECONDS,
    VERSION,
)
from ptp_lightning.sweeps.checkpoints import TrialCheckpoints, folder_of
from ptp_lightning.sweeps.names import describe, run_name
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.study import Overrides, Parameters, Study, short_name
from ptp_lightning.sweeps.training_run import (
    Result,
    TrainingRuns,
    budget_overrides,
    fit_arguments,
    fit_command,
    logger_overrides,
    override_arguments,
)
from ptp_lightning.sweeps.trial_callbacks import Heartbeat, PruneAtValidation
from ptp_lightning.sweeps.versions import package_version
from ptp_lightning.training.callbacks import LogProgress
from ptp_lightning.utils.user_errors import TerminatedError

TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
PROGRESS_SECONDS = 300.0
PROGRESS_FRACTION = 0.25
"""A line of a trial's progress is due after so much time or so much of its steps; several trials may share a log."""


class Worker:
    """Trains trials of a study in this process.

    Args:
        study: the study.
        queue: its points.
        base: file of the base configuration.
        overrides: of all trials, from the command line.
        folder: of the study; TensorBoard files and checkpoints are written below it.
        log: is called with a line at the start and at the end of every trial.
    """

    def __init__(
        self,
        study: Study,
        queue: TrialQueue,
        base: str,
        overrides: Overrides,
        folder: Path,
        log: Callable[[str], None],
    ) -> None:
        self.study = study
        self.queue = queue
        self.base = base
        self.overrides = overrides
        self.tensorboard = folder / TENSORBOARD
        self.checkpoints = folder / CHECKPOINTS
        self.log = log
        self.runs = TrainingRuns()
        self.definition: dict[str, Any] = queue.stored.user_attrs.get(DEFINITION, {})
        self.version = package_version()  # now: the files of a checkout may change while it trains

    def work(self, limit: int | None) -> int:
        """Train until no point is left, or at most `limit` trials; returns the number of trials.

        Raises:
            KeyboardInterrupt: on Ctrl-C or SIGTERM, after the running trial is enqueued again.
        """
        done = 0
        while limit is None or done < limit:
            trial = self.queue.take()
            if trial is None:
                break
            self._train(trial)
            done += 1
        return done

    def arguments(self, parameters: Parameters, seed: int) -> list[str]:
        """Arguments of `fit` for a point."""
        return trial_arguments(self.study, self.base, self.overrides, parameters, seed)

    def _train(self, trial: Trial) -> None:
        parameters: Parameters = {
            name: suggest(trial, name, distribution) for name, distribution in self.study.distributions.items()
        }
        seed = trial.user_attrs[SEED]
        label = describe(parameters, seed)
        self.log(f"trial {trial.number} starts: {label}")
        arguments = self.arguments(parameters, seed)
        run = run_name(trial.number, parameters, seed)
        trial.set_user_attr(COMMAND, fit_command(arguments))
        trial.set_user_attr(LOG_DIR, str(self.tensorboard / run))
        checkpoints = TrialCheckpoints(
            self.checkpoints / folder_of(arguments, self.definition.get("base", {})),
            self.study.steps_of(parameters),
            serves_others=self.study.budget.is_axis,
        )
        pruning = PruneAtValidation(self.study.metric_of(parameters), trial)
        progress = LogProgress(PROGRESS_SECONDS, PROGRESS_FRACTION, f"trial {trial.number}", on_terminals=True)
        hyperparameters = {short_name(name): value for name, value in parameters.items()} | {SEED: seed}
        try:
            try:
                result = self.runs.run(
                    [*arguments, *override_arguments(logger_overrides(self.tensorboard, run))],
                    [pruning, Heartbeat(trial), progress],
                    hyperparameters,
                    checkpoints,
                )
                trial.set_user_attr(SHARED_STEPS, checkpoints.shared_steps)
                self.log(f"{self._record(trial, result, pruning)}: {label} ({result.seconds:.0f} s)")
                checkpoints.remove_own()
            except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns Ctrl-C and SIGTERM into an exit
                self.queue.give_up(trial, "stopped")
                self.queue.fill()
                self.log(f"trial {trial.number} stopped and enqueued again: {label}")
                raise (TerminatedError if _is_sigterm(stop) else KeyboardInterrupt) from stop
            except UpdateFinishedTrialError:
                raise
            except Exception as error:  # of one trial; the next one may succeed
                trial.set_user_attr(TRACEBACK, traceback.format_exc())
                self.queue.stored.tell(trial, state=TrialState.FAIL)
                checkpoints.remove_own()
                self.log(f"trial {trial.number} failed: {label}: {type(error).__name__}: {error}")
        except UpdateFinishedTrialError:
            self.log(f"trial {trial.number} was given up by another process, which took this one for dead: {label}")

    def _record(self, trial: Trial, result: Result, pruning: PruneAtValidation) -> str:
        metric = pruning.metric
        value = result.metrics[metric]
        if math.isnan(value):
            raise ValueError(f"expected a number for {metric}, found NaN after {result.steps} steps")
        for name, entry in (
            (METRICS, result.metrics),
            (ACCURACY, result.accuracy_by_position),
            (PREFIX_COUNTS, result.prefix_counts),
            (STEPS, result.steps),
            (TOKENS, result.tokens),
            (SECONDS, result.seconds),
            (TRAINING_SECONDS, result.training_seconds),
            (CPU_SECONDS, result.cpu_seconds),
            (VERSION, self.version),
        ):
            trial.set_user_attr(name, entry)
        if pruning.pruned:
            self.queue.stored.tell(trial, state=TrialState.PRUNED)
            ended = f"pruned after {result.steps} steps at {value:.4g}"
        else:
            self.queue.stored.tell(trial, value)
            ended = f"has {metric} {value:.4g}"
        progress = self.queue.progress()
        return f"[{progress.ended}/{progress.total}] trial {trial.number} {ended}"


def trial_arguments(study: Study, base: str, overrides: Overrides, parameters: Parameters, seed: int) -> list[str]:
    """Arguments of `fit` for a point; budget, seed and parameters outrank the overrides of the command line."""
    seeds = dict.fromkeys(study.seed_paths, seed)
    budget = budget_overrides(study.budget, study.steps_of(parameters))
    return fit_arguments(base, study.overrides, overrides, budget, seeds, study.overrides_of(parameters))


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> bool | int | float | str | None:
    """The value of a parameter: that of the enqueued point, or the sampler's choice."""
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case FloatDistribution():
            return trial.suggest_float(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case _:
            raise TypeError(f"expected one of Optuna's distributions for {name}, found {distribution}")


def _is_sigterm(stop: BaseException) -> bool:
    """Whether SIGTERM has stopped a training: between two steps, or before or amid one."""
    return any(isinstance(end, (SIGTERMException, TerminatedError)) for end in (stop, stop.__context__))
