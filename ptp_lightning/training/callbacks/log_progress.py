"""LogProgress: lines of text where there is no terminal for a progress bar."""

from __future__ import annotations

import math
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer

from ptp_lightning.batch import PackedBatch
from ptp_lightning.training.trainer_state import val_summary
from ptp_lightning.utils.progress_lines import LinePacer, print_line


class LogProgress(Callback):
    """Prints a line to standard error from time to time if the output is not a terminal, for instance under SLURM.

    A line has the step, the training loss, the correct tokens of the last validation, tokens per second since the last
    line, and the remaining time.

    Args:
        every_seconds: a line is printed after so much time,
        every_fraction: or after this fraction of all steps, whichever comes first.

    Raises:
        ValueError: one of them is not positive.
    """

    def __init__(self, every_seconds: float = 30.0, every_fraction: float = 0.05) -> None:
        self._pacer = LinePacer(every_seconds, every_fraction)
        self._is_active = False
        self._last_step = 0
        self._num_tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        console = rich.get_console()
        shows_bar = console.is_terminal or console.is_jupyter
        is_test = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        self._is_active = trainer.is_global_zero and not shows_bar and not is_test
        self._last_step = trainer.global_step
        self._num_tokens = 0
        self._pacer.start(trainer.global_step / trainer.estimated_stepping_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        if not self._is_active:
            return
        if isinstance(batch, PackedBatch):
            self._num_tokens += batch.input_ids.numel() * trainer.world_size
        if trainer.global_step == self._last_step:  # a micro-batch before the last one
            return
        self._last_step = trainer.global_step
        seconds = self._pacer.seconds_since_line()
        if self._pacer.is_due(trainer.global_step / trainer.estimated_stepping_batches):
            print_line(*self._parts(trainer, pl_module, seconds))
            self._num_tokens = 0

    def _parts(self, trainer: Trainer, pl_module: LightningModule, seconds: float) -> list[str]:
        step, max_steps = trainer.global_step, trainer.estimated_stepping_batches
        summary = val_summary(trainer, pl_module)
        is_finite = math.isfinite(max_steps)
        parts = [f"step {step}/{max_steps:.0f} ({step / max_steps:.0%})" if is_finite else f"step {step}"]
        loss = trainer.callback_metrics.get("train/loss_nats")
        if loss is not None:
            parts.append(f"loss {float(loss):.3f} nats")
        if summary is not None and summary.num_windows > 0:
            parts.append(f"validation {float(summary.correct_tokens):.2f} correct tokens")
        if self._num_tokens and seconds > 0:
            parts.append(f"{self._num_tokens / seconds:,.0f} tokens/s")
        if is_finite:
            parts.append(self._pacer.time_left(step / max_steps))
        return parts
