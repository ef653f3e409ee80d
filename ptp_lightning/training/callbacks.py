"""Callbacks that report a run: charts and figures by position, hyperparameters with results, a final summary.

They read `val_summary`, the `WindowSummary` that a module sets at the end of each validation epoch. They do nothing for
modules without one, and those for TensorBoard do nothing without a `TensorBoardLogger` (so `fast_dev_run` is not a
special case). They write on rank zero only.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.metrics import WindowSummary, as_tags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHARTS = {
    "by position": {
        "accuracy": ["Multiline", [r"val/accuracy/position_\d+"]],
        "accuracy given a correct prefix": ["Multiline", [r"val/accuracy_given_prefix/position_\d+"]],
        "perplexity": ["Multiline", [r"val/perplexity/position_\d+"]],
        "divergence from the teacher": ["Multiline", [r"val/kl/position_\d+"]],
    }
}
FIGURE_TAG = "val/correct_token_counts"
MAX_TABLE_ROWS = 16


class StepProgressBar(RichProgressBar):
    """Lightning's progress bar for training streams without epochs, which Lightning labels `Epoch 0/-2`."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as the other label


class PositionCharts(Callback):
    """TensorBoard: one chart with a line per position for each metric, and a figure of correct-token counts.

    The charts are a layout of the custom-scalars plugin, written once; the figure is drawn at every validation. A
    complete validation before the first step (`trainer.num_sanity_val_steps: -1`) is logged as step 0, including its
    scalars, which Lightning discards.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout."""
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_custom_scalars(CHARTS)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure; the module has set its `val_summary`."""
        summary = val_summary(trainer, pl_module)
        if summary is None or summary.num_windows == 0:
            return
        for logger in tensorboard_loggers(trainer):
            if trainer.sanity_checking:
                logger.log_metrics(as_tags(summary), step=0)
            logger.experiment.add_figure(
                FIGURE_TAG, draw_correct_token_counts(summary), global_step=trainer.global_step
            )


class FinalMetrics(Callback):
    """TensorBoard's hyperparameter table: the settings of each run with its last validation.

    Use it with `TensorBoardLogger(default_hp_metric=False)`. Metrics by position are left to the charts.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the logger's hyperparameters again, with metrics."""
        summary = val_summary(trainer, pl_module)
        metrics = {} if summary is None else as_tags(summary)
        metrics |= {tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith("val/")}
        metrics = {tag: value for tag, value in metrics.items() if "/position_" not in tag}
        if metrics:
            for logger in tensorboard_loggers(trainer):
                # Without the step the final values would be added to the curves at step 0.
                logger.log_hyperparams(logger.hparams, metrics, step=trainer.global_step)


class RunSummary(Callback):
    """Prints results, files and the next command at the end of training.

    It compares the first complete validation with the last one. It prints without a logger too, but not in a
    `fast_dev_run`.
    """

    def __init__(self) -> None:
        self.first: WindowSummary | None = None
        self.last: WindowSummary | None = None
        self.complete = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that training has finished."""
        self.complete = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier run of the same trainer."""
        self.first = self.last = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the summary."""
        summary = val_summary(trainer, pl_module)
        if summary is not None and summary.num_windows > 0:
            self.first = self.first or summary
            self.last = summary

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
            command = f"python -m ptp_lightning generate --ckpt_path {shlex.quote(checkpoint)} --prompt "
            _print_line("Next", command + '"def "')


def val_summary(trainer: Trainer, pl_module: LightningModule) -> WindowSummary | None:
    """The module's last validation; None if there is none but an incomplete sanity check."""
    if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
        return None
    summary = getattr(pl_module, "val_summary", None)
    return summary if isinstance(summary, WindowSummary) else None


def is_text(trainer: Trainer) -> bool:
    """Whether the data are text, so that the trained model can continue a prompt; other series have no tokenizer."""
    data: object = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return not isinstance(data, PackedDataModule) or data.tokenizer is not None


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """The trainer's TensorBoard loggers on rank zero; an empty list on other ranks."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def checkpoint_path(trainer: Trainer) -> str | None:
    """The best checkpoint by the monitored metric, or the newest without one; None if none was written."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint):
        return None
    path = checkpoint.best_model_path or checkpoint.last_model_path
    return _short(path) if path else None


def draw_correct_token_counts(summary: WindowSummary) -> Figure:
    """Bar chart: the fraction of windows with a correct prefix of 0, 1, .. L tokens."""
    from matplotlib.figure import Figure  # slow to import; a figure without pyplot needs no display

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    shares = (summary.prefix_counts.double() / summary.num_windows).cpu()
    axes.bar(range(len(shares)), shares.numpy(), color="tab:blue")
    mean = float(summary.correct_tokens)
    axes.axvline(mean, color="tab:orange", label=f"mean {mean:.2f}")
    axes.set(xlabel="correct tokens per call", ylabel="fraction of windows", ylim=(0, 1))
    axes.legend()
    return figure


def correct_tokens_table(first: WindowSummary, last: WindowSummary) -> Table:
    """Correct tokens of the first and the last validation, with and without the first token, which is always exact."""
    table = Table(box=SIMPLE_HEAD, title="Validation", title_justify="left")
    table.add_column("")
    for name in ("first", "last"):
        table.add_column(name, justify="right")
    table.add_row("correct tokens per call", *(_mean_and_error(summary, minus=0) for summary in (first, last)))
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
