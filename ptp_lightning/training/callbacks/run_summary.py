"""RunSummary: results, files and the next command at the end of a training, and results of a validation or test."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.metrics import WindowSummary, as_tags
from ptp_lightning.training.trainer_state import datamodule_of, val_summary
from ptp_lightning.utils.chat_templates import example_options

MAX_TABLE_ROWS = 16
MEASUREMENTS = {"validate": "Validation", "test": "Test"}
"""Titles by the stages of a trainer that measures without training."""


class RunSummary(Callback):
    """Prints results, files and the next command at the end of training, and the results of `validate` and `test`.

    At the end of training it compares the first complete validation with the last one. It prints without a logger too,
    but not in a `fast_dev_run`.
    """

    def __init__(self) -> None:
        self.first: WindowSummary | None = None
        self.last: WindowSummary | None = None
        self.complete = False
        self.measured = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that training has finished."""
        self.complete = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier run of the same trainer."""
        self.first = self.last = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the summary."""
        self.measured = True
        summary = val_summary(trainer, pl_module)
        if summary is not None and summary.num_windows > 0:
            self.first = self.first or summary
            self.last = summary

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the summary."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print how to resume after Ctrl-C or SIGTERM.

        `ModelCheckpoint` with `save_on_exception` writes its file after this.
        """
        checkpoint = trainer.checkpoint_callback
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if stopped and isinstance(checkpoint, ModelCheckpoint):
            _print_line("Stopped", f"at step {trainer.global_step}; checkpoints in {_short(str(checkpoint.dirpath))}")
            _print_line("Resume", "the same command with --ckpt_path last")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the summary, after the progress bar is closed."""
        if stage in MEASUREMENTS and self.measured and trainer.is_global_zero:
            rich.print(measurement_table(MEASUREMENTS[stage], trainer.callback_metrics, self.last))
            if self.last is not None:
                rich.print(positions_table(self.last))
        if not self.complete:
            return
        self.complete = False
        if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if self.first is not None and self.last is not None:
            rich.print(correct_tokens_table(self.first, self.last), positions_table(self.last))
        for logger in trainer.loggers:
            # Not `trainer.log_dir`, which is a collective call.
            directory = getattr(logger, "log_dir", None) or logger.save_dir
            if directory is not None:
                _print_line("Logs", _short(directory))
            if isinstance(logger, TensorBoardLogger):
                _print_line("Watch", f"tensorboard --logdir {shlex.quote(_short(logger.root_dir))}")
        checkpoint = checkpoint_path(trainer)
        if checkpoint is None:
            return
        _print_line("Checkpoint", checkpoint)
        if self.last is not None and is_text(trainer):
            tokenizer = getattr(datamodule_of(trainer), "tokenizer", None)
            command = f"python -m ptp_lightning generate --ckpt_path {shlex.quote(checkpoint)}"
            _print_line("Next", f"{command} {example_options(tokenizer)}")


def measurement_table(title: str, metrics: Mapping[str, Any], summary: WindowSummary | None) -> Table:
    """The metrics of a validation or test that are not by position."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    if summary is not None:
        table.add_row("correct tokens of a window", _mean_and_error(summary, minus=0))
        table.add_row("gained by the slots", _mean_and_error(summary, minus=1))
    for tag, value in metrics.items():
        name = tag.partition("/")[2]
        if tag.startswith(("val/", "test/")) and "/" not in name and not name.startswith("correct_tokens"):
            table.add_row(name.replace("_nats", " (nats)").replace("_", " "), f"{float(value):.4f}")
    return table


def is_text(trainer: Trainer) -> bool:
    """Whether the data are text, so that the trained model can continue a prompt; other series have no tokenizer."""
    data: object = datamodule_of(trainer)
    return not isinstance(data, PackedDataModule) or data.tokenizer is not None


def checkpoint_path(trainer: Trainer) -> str | None:
    """The best checkpoint by the monitored metric, or the newest without one; None if none was written."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint):
        return None
    path = checkpoint.best_model_path or checkpoint.last_model_path
    return _short(path) if path else None


def correct_tokens_table(first: WindowSummary, last: WindowSummary) -> Table:
    """Correct tokens of the first and the last validation, with and without the first token, which is always exact."""
    table = Table(box=SIMPLE_HEAD, title="Validation", title_justify="left")
    table.add_column("")
    for name in ("first", "last"):
        table.add_column(name, justify="right")
    table.add_row("correct tokens of a window", *(_mean_and_error(summary, minus=0) for summary in (first, last)))
    table.add_row("gained by the slots", *(_mean_and_error(summary, minus=1) for summary in (first, last)))
    return table


def positions_table(summary: WindowSummary) -> Table:
    """Accuracy by position, for the first `MAX_TABLE_ROWS` positions; "-" where there is no data."""
    tags = as_tags(summary)
    window_length = summary.prefix_counts.numel() - 1
    shown = min(window_length, MAX_TABLE_ROWS)
    more = "" if shown == window_length else f" (first {shown} of {window_length})"
    table = Table(box=SIMPLE_HEAD, title=f"Accuracy by position{more}", title_justify="left")
    for name in ("position", "accuracy", "given a correct prefix"):
        table.add_column(name, justify="right")
    for position in range(shown):
        values = [tags.get(f"val/{name}/position_{position:02d}") for name in ("accuracy", "accuracy_given_prefix")]
        table.add_row(str(position), *("-" if value is None else f"{value:.3f}" for value in values))
    return table


def _mean_and_error(summary: WindowSummary, minus: int) -> str:
    mean = f"{float(summary.correct_tokens) - minus:.2f}"
    return mean if summary.num_windows < 2 else f"{mean} ± {float(summary.standard_error):.2f}"


def _print_line(label: str, text: str) -> None:
    # Neither wrapped nor parsed as markup, so that the line can be copied.
    rich.get_console().print(Text(f"{label:<12}{text}"), soft_wrap=True, highlight=False)


def _short(path: str | os.PathLike[str]) -> str:
    """The path relative to the current directory if it is below it."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith(os.pardir) else relative
