"""Callbacks of a trial: how long it trains, that it is alive, and whether it is worth going on."""

from __future__ import annotations

import time

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from optuna.trial import Trial

from ptp_lightning.sweeps.attributes import HEARTBEAT

HEARTBEAT_SECONDS = 60.0


class TrainingClock(Callback):
    """Measures a training from its first step to the end of its last validation.

    Attributes:
        seconds: of wall-clock time.
    """

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._begin = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds = time.monotonic() - self._begin


class Heartbeat(Callback):
    """Notes down at times that a trial is alive, for processes on other machines.

    Args:
        trial: the trial.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._noted = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """See the class."""
        self._beat()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """See the class."""
        self._beat()

    def _beat(self) -> None:
        if time.monotonic() - self._noted > HEARTBEAT_SECONDS:
            self._noted = time.monotonic()
            self.trial.set_user_attr(HEARTBEAT, time.time())


class PruneAtValidation(Callback):
    """Reports every validation to the study, whose pruner may end the training; all ranks then stop together.

    The last validation is reported, but ends nothing: what is finished is a result.

    Args:
        metric: what is reported.
        trial: to whom; by default nobody is told, as on other ranks than the first, which only obey.

    Attributes:
        pruned: whether the training was ended.
    """

    def __init__(self, metric: str = "", trial: Trial | None = None) -> None:
        self.metric = metric
        self.trial = trial
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, decide on the first rank, and tell the others.

        Raises:
            ValueError: nothing of the metric's name was logged.
        """
        if trainer.sanity_checking:
            return
        pruned = False
        if self.trial is not None:
            if self.metric not in trainer.callback_metrics:
                raise ValueError(
                    f"expected a validation that logs objective.metric {self.metric}, found "
                    f"{sorted(tag for tag in trainer.callback_metrics if '/position_' not in tag)}"
                )
            self.trial.report(float(trainer.callback_metrics[self.metric]), trainer.global_step)
            pruned = trainer.global_step < trainer.max_steps and self.trial.should_prune()
        self.pruned = trainer.strategy.broadcast(pruned)
        if self.pruned:
            trainer.should_stop = True
