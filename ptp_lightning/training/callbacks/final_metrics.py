"""RunSettings and FinalMetrics: the hyperparameters of a run, with its results."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from ptp_lightning.metrics import as_tags
from ptp_lightning.training.trainer_state import tensorboard_loggers, val_summary

HEADLINES = ("val/correct_tokens", "train/loss_nats")


class RunSettings(Callback):
    """Gives the settings of a run to all loggers, once and on rank zero.

    Args:
        settings: by name.
    """

    def __init__(self, settings: Mapping[str, bool | int | float | str]) -> None:
        self.settings = dict(settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log them before a training; Lightning saves them when all callbacks have been set up."""
        if stage == "fit":
            for logger in trainer.loggers:
                logger.log_hyperparams(self.settings)


class FinalMetrics(Callback):
    """TensorBoard's hyperparameter table: the settings of each run with its last validation.

    Use it with `TensorBoardLogger(default_hp_metric=False)`. Metrics by position are left to the charts.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the logger's hyperparameters again, with metrics."""
        summary = val_summary(trainer, pl_module)
        found = {} if summary is None else as_tags(summary)
        found |= {tag: float(value) for tag, value in trainer.callback_metrics.items()}
        metrics = {tag: found[tag] for tag in HEADLINES if tag in found}
        metrics |= {tag: value for tag, value in found.items() if tag.startswith("val/") and "/position_" not in tag}
        if metrics:
            for logger in tensorboard_loggers(trainer):
                # Without the step the final values would be added to the curves at step 0.
                logger.log_hyperparams(logger.hparams, metrics, step=trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what an interrupted training has reached."""
        self.on_fit_end(trainer, pl_module)
