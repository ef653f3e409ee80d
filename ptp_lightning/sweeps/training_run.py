"""One training of a study: the configuration that `python -m ptp_lightning fit` would read, run in this process."""

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
from ptp_lightning.sweeps.study import Budget, Overrides
from ptp_lightning.sweeps.trial_callbacks import PruneAtValidation, TrainingClock
from ptp_lightning.training.callbacks import RunSummary
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.utils.user_errors import plain_reason

# What a person watches or goes on from; a study keeps numbers, and the configuration to make a model of any of them.
LEFT_OUT = (Checkpoint, ProgressBar, RunSummary)
FOLLOWER_ARGUMENTS = "SWEEPS_FOLLOWER_ARGUMENTS"  # the environment variable that tells other ranks what to train


class RaisingParser(PlainErrorParser):
    """The parser of `fit`, whose errors are raised, because a study goes on behind them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what was wrong as a ValueError."""
        raise ValueError(plain_reason(message))


class TrialCLI(TrainingCLI):
    """The command line of `fit` without the callbacks that show a single run and keep its checkpoints."""

    def before_instantiate_classes(self) -> None:
        """Take the callbacks out of the configuration, and those that Lightning would put in their place."""
        trainer = self.config.trainer
        trainer.callbacks = [one for one in trainer.callbacks or [] if not issubclass(_class(one), LEFT_OUT)]
        trainer.enable_checkpointing = trainer.enable_progress_bar = False


class ParsingCLI(TrialCLI):
    """Only reads a configuration."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class SharedCorpus(Corpus):
    """Documents that are read once for all trials of a process.

    Args:
        corpus: where they come from.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._documents: dict[Split, list[Document]] = {}

    def documents(self, split: Split) -> Iterator[Document]:
        """See `Corpus.documents`."""
        if split not in self._documents:
            self._documents[split] = list(self.corpus.documents(split))
        return iter(self._documents[split])


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        metrics: the last validation's, by tag.
        accuracy_by_position: of the window's positions; None for a module that predicts no windows.
        prefix_counts: how many windows have 0, 1, .. right tokens before the first error; None as above.
        steps: optimiser steps.
        tokens: tokens of all windows that were trained on.
        seconds: with reading the configuration and building the model.
        training_seconds: from the first step to the end of the last validation.
    """

    metrics: dict[str, float]
    accuracy_by_position: list[float] | None
    prefix_counts: list[int] | None
    steps: int
    tokens: int
    seconds: float
    training_seconds: float


class TrainingRuns:
    """Trains one configuration after the other; what they have in common is read once."""

    def __init__(self) -> None:
        self._corpora: dict[str, Corpus] = {}

    def run(
        self, arguments: Sequence[str], callbacks: Iterable[Callback], hyperparameters: Mapping[str, Any]
    ) -> Result:
        """Train.

        Args:
            arguments: of `fit`.
            callbacks: besides those of the configuration.
            hyperparameters: to be shown with the results.

        Raises:
            ValueError: the configuration is not one that can be trained.
        """
        begin = time.monotonic()
        with followers_know(arguments):
            cli = parsed(TrialCLI, RaisingParser, list(arguments), run=False)
            self._share(cli.datamodule)
            clock = TrainingClock()
            cli.trainer.callbacks += [clock, *callbacks]  # pyright: ignore[reportAttributeAccessIssue]
            for logger in cli.trainer.loggers:
                logger.log_hyperparams(dict(hyperparameters))
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
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
                seconds=time.monotonic() - begin,
                training_seconds=clock.seconds,
            )

    def _share(self, data: LightningDataModule) -> None:
        if isinstance(data, CorpusDataModule):
            data.corpus = self._corpora.setdefault(repr(data.corpus), SharedCorpus(data.corpus))


def follow() -> None:
    """Be another rank of the training that the first rank of a trial has just started.

    Lightning starts other ranks with the first one's command and environment. They know no storage; what they train is
    in the environment, and whether to go on they are told.
    """
    quiet_training()
    cli = parsed(TrialCLI, RaisingParser, json.loads(os.environ[FOLLOWER_ARGUMENTS]), run=False)
    cli.trainer.callbacks.append(PruneAtValidation())  # pyright: ignore[reportAttributeAccessIssue]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)


def read_configuration(arguments: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of `fit` with these arguments, as plain data.

    Raises:
        ValueError: an argument or a key of the file does not exist, or a value does not fit.
    """
    return parsed(ParsingCLI, RaisingParser, list(arguments), run=False).config.as_dict()


def build(arguments: Sequence[str]) -> None:
    """Build everything that a training needs, to see whether it is there.

    Raises:
        ValueError: parts do not fit each other, or something is missing.
        FileNotFoundError: a file is missing.
    """
    parsed(TrialCLI, RaisingParser, list(arguments), run=False)


def fit_arguments(base: str, *overrides: Overrides) -> list[str]:
    """What `fit` is told: a configuration and overrides, of which later ones win."""
    return ["--config", base, *(argument for group in overrides for argument in override_arguments(group))]


def override_arguments(overrides: Overrides) -> list[str]:
    """Overrides as arguments."""
    return [f"--{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in overrides.items()]


def fit_command(arguments: Sequence[str]) -> str:
    """To type, for the same training by itself."""
    return shlex.join(["python", "-m", "ptp_lightning", "fit", *arguments])


def budget_overrides(budget: Budget) -> Overrides:
    """The length of a training and its validations."""
    return {"trainer.max_steps": budget.steps, "trainer.val_check_interval": budget.steps // budget.validations}


def logger_overrides(folder: Path, run: str) -> Overrides:
    """TensorBoard files in a folder of their own below the study's."""
    arguments = {"save_dir": str(folder), "name": "", "version": run, "default_hp_metric": False}
    return {
        "trainer.logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": arguments},
    }


def tokens_per_step(configuration: Mapping[str, Any], world_size: int) -> int:
    """Tokens of the windows of one optimiser step, over all ranks.

    Raises:
        ValueError: the configuration is none that trains on windows.
    """
    try:
        data = configuration["data"]["init_args"]
        windows = data["batch_size"] * data["num_windows"]
        length = configuration["model"]["init_args"]["predictor"]["window_length"]
    except KeyError as error:
        raise ValueError(
            f"expected the configuration of a predictor that is trained on windows, found one without {error}: set base"
        ) from error
    return windows * length * configuration["trainer"]["accumulate_grad_batches"] * world_size


def configured_world_size(configuration: Mapping[str, Any]) -> int:
    """Processes of a training, as far as the configuration says so before it starts."""
    devices = configuration["trainer"]["devices"]
    return int(devices) if str(devices).isdigit() else 1


def quiet_training() -> None:
    """Let a study's own lines be seen: what Lightning tells of every training is the same each time."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def followers_know(arguments: Sequence[str]) -> Iterator[None]:
    """Tell other ranks of a training what to train; afterwards forget them, so that the next one can have its own."""
    before = dict(os.environ)
    os.environ[FOLLOWER_ARGUMENTS] = json.dumps(list(arguments))
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():  # where Lightning notes down its ranks
            del os.environ[name]
        gc.collect()  # trainer, model and data refer to each other; the next ones shall find their memory free


def _class(entry: Any) -> type:
    """The class that an entry of a configuration names."""
    module, _, name = entry.class_path.rpartition(".")
    return getattr(import_module(module), name)
