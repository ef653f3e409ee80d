"""One training of a study: what `python -m ptp_lightning fit` does, in this process."""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from ptp_lightning.data.corpus import Corpus, Document, Split
from ptp_lightning.data.datamodule import CorpusDataModule
from ptp_lightning.metrics import WindowSummary
from ptp_lightning.sweeps.budget import STEPS_KEY, Budget
from ptp_lightning.sweeps.checkpoints import TrialCheckpoints
from ptp_lightning.sweeps.study import Overrides
from ptp_lightning.sweeps.trial_callbacks import PruneAtValidation, TrainingClock, require_metric
from ptp_lightning.training.callbacks import LogProgress, RunSummary, RunText
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.utils.user_errors import plain_reason

# A study keeps metrics and the commands to repeat its trainings; it has checkpoints of its own, see `TrialCheckpoints`,
# and lines of progress that name the trial and are rarer, see `Worker`.
LEFT_OUT = (Checkpoint, ProgressBar, LogProgress, RunSummary, RunText)
CHECKED_BATCHES = 2  # of a validation that shows which metrics are logged
FOLLOWER_ARGUMENTS = "SWEEPS_FOLLOWER_ARGUMENTS"  # environment variable with the arguments of `fit` for other ranks


class RaisingParser(PlainErrorParser):
    """The parser of `fit`, but errors are raised: one trial's error must not end the study."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what was wrong as a ValueError."""
        raise ValueError(plain_reason(message))


class TrialCLI(TrainingCLI):
    """The command line of `fit` without checkpoints, progress bar and closing summary.

    Loggers get the parameters of the trial only.
    """

    logs_settings = False

    def before_instantiate_classes(self) -> None:
        """Remove these callbacks from the configuration, and keep Lightning from adding its own."""
        trainer = self.config.trainer
        trainer.callbacks = [one for one in trainer.callbacks or [] if not issubclass(_class(one), LEFT_OUT)]
        trainer.enable_checkpointing = trainer.enable_progress_bar = False


class ParsingCLI(TrialCLI):
    """Parses a configuration and builds nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing."""


class SharedCorpus(Corpus):
    """Documents of a corpus, read once for all trials of a process.

    Args:
        corpus: the corpus.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._documents: dict[Split, list[Document]] = {}

    @property
    def advice(self) -> str:
        """See `Corpus.advice`."""
        return self.corpus.advice

    def documents(self, split: Split) -> Iterator[Document]:
        """See `Corpus.documents`."""
        if split not in self._documents:
            self._documents[split] = list(self.corpus.documents(split))
        return iter(self._documents[split])


@dataclass(frozen=True)
class Result:
    """Result of a training.

    Attributes:
        metrics: of the last validation, by tag.
        accuracy_by_position: over positions of the window; None for a module that predicts no windows.
        prefix_counts: number of windows with 0, 1, .. correct tokens before the first error; None as above.
        steps: optimiser steps.
        tokens: tokens of all training windows.
        seconds: in total, with reading the configuration, building the model, and the steps before a checkpoint.
        training_seconds: from the first step to the end of the last validation.
        cpu_seconds: as `seconds`, the time of all cores in this process.
    """

    metrics: dict[str, float]
    accuracy_by_position: list[float] | None
    prefix_counts: list[int] | None
    steps: int
    tokens: int
    seconds: float
    training_seconds: float
    cpu_seconds: float


class TrainingRuns:
    """Trains configurations one after the other; shared corpora are read once."""

    def __init__(self) -> None:
        self._corpora: dict[str, Corpus] = {}

    def run(
        self,
        arguments: Sequence[str],
        callbacks: Iterable[Callback],
        hyperparameters: Mapping[str, Any],
        checkpoints: TrialCheckpoints,
    ) -> Result:
        """Train.

        Args:
            arguments: of `fit`.
            callbacks: in addition to those of the configuration.
            hyperparameters: shown beside the results in TensorBoard.
            checkpoints: with which the training begins, and which it writes; on several devices, none.

        Raises:
            ValueError: the configuration cannot be trained.
        """
        begin, cpu_begin = time.monotonic(), time.process_time()
        with follower_environment(arguments):
            cli = parsed(TrialCLI, RaisingParser, list(arguments), run=False)
            self._share(cli.datamodule)
            clock = TrainingClock()
            cli.trainer.callbacks += [clock, *callbacks]  # pyright: ignore[reportAttributeAccessIssue]
            for logger in cli.trainer.loggers:
                logger.log_hyperparams(dict(hyperparameters))
            start = None
            if cli.trainer.world_size == 1:  # other ranks would have to begin with the same checkpoint
                start = checkpoints.start(cli.model)
                cli.trainer.callbacks.append(checkpoints)  # pyright: ignore[reportAttributeAccessIssue]
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=None if start is None else str(start))
            metrics = {tag: float(value) for tag, value in cli.trainer.callback_metrics.items()}
            summary = getattr(cli.model, "val_summary", None)
            windows = summary if isinstance(summary, WindowSummary) else None
            per_step = tokens_per_step(cli.config.as_dict(), cli.trainer.world_size)
            return Result(
                metrics=metrics,
                accuracy_by_position=None if windows is None else windows.accuracy.reshape(-1).tolist(),
                prefix_counts=None if windows is None else windows.prefix_counts.tolist(),
                steps=cli.trainer.global_step,
                tokens=cli.trainer.global_step * per_step,
                seconds=time.monotonic() - begin + clock.earlier_seconds,
                training_seconds=clock.seconds,
                cpu_seconds=time.process_time() - cpu_begin + clock.earlier_cpu_seconds,
            )

    def _share(self, data: LightningDataModule) -> None:
        if isinstance(data, CorpusDataModule):
            data.corpus = self._corpora.setdefault(repr(data.corpus), SharedCorpus(data.corpus))


def run_follower() -> None:
    """Train a trial as another rank than the first.

    Lightning starts other ranks with the command and the environment of rank 0. They do not open the storage: their
    arguments are in the environment, and rank 0 broadcasts whether the trial is pruned.
    """
    silence_training_logs()
    cli = parsed(TrialCLI, RaisingParser, json.loads(os.environ[FOLLOWER_ARGUMENTS]), run=False)
    cli.trainer.callbacks.append(PruneAtValidation())  # pyright: ignore[reportAttributeAccessIssue]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)


def read_configuration(arguments: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of `fit` with these arguments, as plain data.

    Raises:
        ValueError: an argument or a key of the file does not exist, or a value does not fit.
    """
    return parsed(ParsingCLI, RaisingParser, list(arguments), run=False).config.as_dict()


def build(arguments: Sequence[str]) -> TrialCLI:
    """Build model, data and trainer, to find errors before a study starts.

    Raises:
        ValueError: parts do not fit each other, or something is missing.
        FileNotFoundError: a file is missing.
    """
    return parsed(TrialCLI, RaisingParser, list(arguments), run=False)


def require_logged(metric: str, arguments: Sequence[str]) -> None:
    """Validate two batches, to find out whether a training logs a metric before one begins.

    Trainings on several devices are only built, because one device may be too small for them; their trials find it out
    in the validation before their first step.

    Raises:
        ValueError: the metric is not logged; or as `build`.
        FileNotFoundError: as `build`.
    """
    cli = build([*arguments, "--trainer.logger=false", f"--trainer.limit_val_batches={CHECKED_BATCHES}"])
    if cli.trainer.world_size == 1:
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        require_metric(metric, cli.trainer)


def fit_arguments(base: str, *overrides: Overrides) -> list[str]:
    """Arguments of `fit`: a configuration and overrides; later ones win.

    >>> fit_arguments("run.yaml", {"trainer.max_steps": 3}, {"model.init_args.seed": 1})
    ['--config', 'run.yaml', '--trainer.max_steps=3', '--model.init_args.seed=1']
    """
    return ["--config", base, *(argument for group in overrides for argument in override_arguments(group))]


def override_arguments(overrides: Overrides) -> list[str]:
    """Overrides as arguments of the command line."""
    return [f"--{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in overrides.items()]


def fit_command(arguments: Sequence[str]) -> str:
    """The command that repeats a training."""
    return shlex.join(["python", "-m", "ptp_lightning", "fit", *arguments])


def budget_overrides(budget: Budget, steps: int) -> Overrides:
    """Overrides for one of the budget's numbers of steps, and the number of validations."""
    return {STEPS_KEY: steps, "trainer.val_check_interval": steps // budget.validations}


def logger_overrides(folder: Path, run: str) -> Overrides:
    """Overrides that log a trial to its own folder below the study's."""
    arguments = {"save_dir": str(folder), "name": "", "version": run, "default_hp_metric": False}
    return {
        "trainer.logger": {
            "class_path": "ptp_lightning.training.loggers.OverviewTensorBoardLogger",
            "init_args": arguments,
        },
    }


def tokens_per_step(configuration: Mapping[str, Any], world_size: int) -> int:
    """Tokens of the windows of one optimiser step, over all ranks.

    Raises:
        ValueError: the configuration does not train on windows.
    """
    try:
        data = configuration["data"]["init_args"]
        windows = data["batch_size"] * data["num_windows"]
        length = configuration["model"]["init_args"]["predictor"]["window_length"]
    except KeyError as error:
        raise ValueError(
            f"expected a configuration that trains on windows, found one without {error}: set base of the study"
        ) from error
    return windows * length * configuration["trainer"]["accumulate_grad_batches"] * world_size


def configured_world_size(configuration: Mapping[str, Any]) -> int:
    """Number of processes, if the configuration sets it; 1 otherwise."""
    devices = configuration["trainer"]["devices"]
    return int(devices) if str(devices).isdigit() else 1


def silence_training_logs() -> None:
    """Hide Lightning's messages, which are the same for every trial."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def follower_environment(arguments: Sequence[str]) -> Iterator[None]:
    """Pass the arguments to other ranks; afterwards close the process group, so that the next trial starts its own."""
    before = dict(os.environ)
    os.environ[FOLLOWER_ARGUMENTS] = json.dumps(list(arguments))
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():  # Lightning's ranks
            del os.environ[name]
        gc.collect()  # trainer, model and data refer to each other; free their memory for the next trial


def _class(entry: Any) -> type:
    """The class of an entry of a configuration."""
    module, _, name = entry.class_path.rpartition(".")
    return getattr(import_module(module), name)
