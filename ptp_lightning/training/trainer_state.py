"""What modules and callbacks read from the trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ptp_lightning.metrics import WindowSummary


def datamodule_of(trainer: Trainer) -> Any:
    """The data module of a running trainer; any class, or None."""
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  Lightning adds it to each trainer


def val_summary(trainer: Trainer, pl_module: LightningModule) -> WindowSummary | None:
    """The module's last validation; None if there is none but an incomplete sanity check."""
    if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
        return None
    summary = getattr(pl_module, "val_summary", None)
    return summary if isinstance(summary, WindowSummary) else None


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """The trainer's TensorBoard loggers on rank zero; an empty list on other ranks."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
