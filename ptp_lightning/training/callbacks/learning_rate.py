"""LearningRate: the learning rate under its usual name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

TAG = "train/learning_rate"


class LearningRate(Callback):
    """Logs the learning rate of the first group of parameters.

    Lightning's `LearningRateMonitor` logs one for each group, as `lr-AdamW/pg1` and so on. Here groups differ in weight
    decay; with Muon, the first one has the weight matrices.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rate of this step."""
        period: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if period and trainer.global_step % period == 0 and trainer.optimizers:  # 0 for never
            rate = float(trainer.optimizers[0].param_groups[0]["lr"])
            for logger in trainer.loggers:
                logger.log_metrics({TAG: rate}, step=trainer.global_step)
