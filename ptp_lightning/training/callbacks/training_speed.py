"""TrainingSpeed: tokens and windows per second, seconds per step, and memory."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ptp_lightning.batch import PackedBatch

BYTES_PER_GIB = 2**30


class TrainingSpeed(Callback):
    """Logs the speed between two logged steps (`trainer.log_every_n_steps`) without the time of validations.

    Nothing waits for the device. Tokens are those of all processes with padding; memory is the device's peak, on a CPU
    what the process holds.
    """

    def __init__(self) -> None:
        self._begin: float | None = None  # the first step is not measured: it warms up
        self._step = 0  # at which the interval began
        self._last_step = 0
        self._num_tokens = self._num_windows = 0
        self._validation_begin = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._begin = None
        self._last_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._validation_begin = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue."""
        if self._begin is not None:
            self._begin += time.perf_counter() - self._validation_begin

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at the end of an interval."""
        if isinstance(batch, PackedBatch):
            self._num_tokens += batch.input_ids.numel() * trainer.world_size
            self._num_windows += batch.window_starts.numel() * trainer.world_size
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch before the last one
            return
        self._last_step = step
        if self._begin is None:
            self._restart(step)
        elif (period := trainer.log_every_n_steps) and step % period == 0:  # pyright: ignore[reportAttributeAccessIssue]
            seconds = time.perf_counter() - self._begin
            metrics = {
                "perf/seconds_per_step": seconds / (step - self._step),
                "perf/memory_gib": memory_bytes(pl_module.device) / BYTES_PER_GIB,
            }
            if self._num_tokens:
                metrics["perf/tokens_per_second"] = self._num_tokens / seconds
                metrics["perf/windows_per_second"] = self._num_windows / seconds
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
            self._restart(step)

    def _restart(self, step: int) -> None:
        self._begin, self._step = time.perf_counter(), step
        self._num_tokens = self._num_windows = 0


def memory_bytes(device: torch.device) -> int:
    """The peak of allocated memory on a GPU; on other devices the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
