"""LogProgress: lines of text where there is no terminal for a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer

from ptp_lightning.batch import PackedBatch
from ptp_lightning.training.trainer_state import val_summary
from ptp_lightning.utils.durations import duration_text
from ptp_lightning.utils.progress_lines import LinePacer, print_line


class LogProgress(Callback):
    """Prints a line to standard error from time to time if the output is not a terminal, for instance under SLURM.

    A line of a training has the step, the training loss, the correct tokens of the last validation, tokens per second
    of training since the last line, and the remaining time. A line of a validation or test has the batch and the time
    since its start; it is due after `every_seconds` alone.

    Args:
        every_seconds: a line is printed after so much time,
        every_fraction: or after this fraction of all steps, whichever comes first.
        title: begins each line.
        on_terminals: print on terminals too, where there is no progress bar.

    Raises:
        ValueError: a period is not positive.
    """

    def __init__(
        self,
        every_seconds: float = 30.0,
        every_fraction: float = 0.05,
        title: str = "",
        on_terminals: bool = False,
    ) -> None:
        self._pacer = LinePacer(every_seconds, every_fraction)
        self._title = f"{title}: " if title else ""
        self._on_terminals = on_terminals
        self._is_active = False
        self._last_step = 0
        self._num_tokens = 0  # since `_tokens_begin`
        self._tokens_begin = 0.0  # moves on by the time of each validation
        self._evaluation_begin = 0.0
        self._num_batches = 0  # of the present validation or test

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide whether lines are printed, and start the clock."""
        console = rich.get_console()
        is_log = self._on_terminals or not (console.is_terminal or console.is_jupyter)
        is_dev_run = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        self._is_active = trainer.is_global_zero and is_log and not is_dev_run
        self._pacer.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the training."""
        self._last_step = trainer.global_step
        self._num_tokens = 0
        self._tokens_begin = time.monotonic()
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
        if self._pacer.is_due(trainer.global_step / trainer.estimated_stepping_batches):
            self._print(*self._parts(trainer, pl_module))
            self._num_tokens = 0
            self._tokens_begin = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training."""
        self._evaluation_begin = time.monotonic()
        self._num_batches = 0

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Print a line if it is time."""
        # During the check before training Lightning counts batches of its own.
        totals = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._count_batch("validation", totals)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the clock of the training."""
        self._tokens_begin += time.monotonic() - self._evaluation_begin

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the test."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Print a line if it is time."""
        self._count_batch("test", trainer.num_test_batches)

    def _count_batch(self, name: str, totals: Sequence[int | float]) -> None:
        """Count a batch of a validation or test with these numbers of batches, one a data loader; infinite: unknown."""
        self._num_batches += 1
        if self._is_active and self._pacer.is_due_by_time():
            total = sum(totals)
            of_total = f"/{total:.0f}" if math.isfinite(total) else ""
            elapsed = duration_text(time.monotonic() - self._evaluation_begin)
            self._print(f"{name}: batch {self._num_batches}{of_total}", elapsed)

    def _print(self, *parts: str) -> None:
        print_line(self._title + parts[0], *parts[1:])

    def _parts(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        step, max_steps = trainer.global_step, trainer.estimated_stepping_batches
        summary = val_summary(trainer, pl_module)
        is_finite = math.isfinite(max_steps)
        parts = [f"step {step}/{max_steps:.0f} ({step / max_steps:.0%})" if is_finite else f"step {step}"]
        loss = trainer.callback_metrics.get("train/loss_nats")
        if loss is not None:
            parts.append(f"loss {float(loss):.3f} nats")
        if summary is not None and summary.num_windows > 0:
            parts.append(f"validation {float(summary.correct_tokens):.2f} correct tokens")
        seconds = time.monotonic() - self._tokens_begin
        if self._num_tokens and seconds > 0:
            parts.append(f"{self._num_tokens / seconds:,.0f} tokens/s")
        if is_finite:
            parts.append(self._pacer.time_left(step / max_steps))
        return parts
