"""Lightning's counters after an interruption, aligned with the last complete optimiser step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ptp_lightning.training.optimization import StepSchedule

if TYPE_CHECKING:
    from lightning import Trainer


def align_with_step(trainer: Trainer) -> None:
    """Let a resumed training begin with the first micro-batch after its last optimiser step.

    An exception or a signal stops Lightning in the middle of a batch, and its checkpoint then counts this batch as
    begun. When it resumes, accumulation, validations and schedules would be shifted by one batch, and after the next
    checkpoint by two. Data modules and random numbers of this package go by the optimiser step already.

    Args:
        trainer: has restored the checkpoint, if it resumes, and has not begun its first epoch.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    steps, accumulated, per_epoch = trainer.global_step, trainer.accumulate_grad_batches, trainer.num_training_batches
    if not math.isinf(per_epoch):
        steps -= trainer.current_epoch * math.ceil(per_epoch / accumulated)
    read = int(min(steps * accumulated, per_epoch))
    complete = progress.total.ready == progress.total.processed and progress.current.processed == read
    if complete:  # the checkpoint was written between two batches, and Lightning restores it correctly
        return
    shift = read - progress.current.processed
    for counts, value in ((progress.current, read), (progress.total, progress.total.processed + shift)):
        counts.ready = counts.started = counts.processed = counts.completed = value
    for entry in trainer.lr_scheduler_configs:
        if isinstance(entry.scheduler, StepSchedule):
            entry.scheduler.resume_at(trainer.global_step)


def align_logged_step(trainer: Trainer, *, validates: bool = False) -> None:
    """Let loggers count optimiser steps, as in a training that was never interrupted.

    Lightning logs with a counter of its own. A run that resumes after a polite stop begins with a counter that is one
    too large, and a chain of such runs drifts.

    Args:
        trainer: at the start of a batch, or of a validation.
        validates: a validation follows a batch. It is logged with the step of that batch, which Lightning counts later.
    """
    loop = trainer.fit_loop.epoch_loop
    has_stepped = validates and not loop._should_accumulate()
    loop._batches_that_stepped = trainer.global_step - int(has_stepped)
