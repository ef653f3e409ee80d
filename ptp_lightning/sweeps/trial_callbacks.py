"""Callbacks of a trial: training time, heartbeat and pruning; for checkpoints see `TrialCheckpoints`."""

from __future__ import annotations

import time

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from optuna.trial import Trial

from ptp_lightning.sweeps.attributes import HEARTBEAT, HEARTBEAT_STEP, START_STEP

HEARTBEAT_SECONDS = 60.0


class TrainingClock(Callback):
    """Measures a training from its first step to the end of its last validation, also across interruptions.

    Checkpoints hold its state, so a resumed training counts the time of the steps before.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: time of all cores in this process.
        earlier_seconds: of `seconds`, those before the checkpoint with which the training began.
        earlier_cpu_seconds: of `cpu_seconds`.
    """

    def __init__(self) -> None:
        self.seconds = self.earlier_seconds = 0.0
        self.cpu_seconds = self.earlier_cpu_seconds = 0.0
        self._begin, self._cpu_begin = time.monotonic(), time.process_time()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._begin, self._cpu_begin = time.monotonic(), time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._read()

    def state_dict(self) -> dict[str, float]:
        """The time until now."""
        self._read()
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Count on from there."""
        self.earlier_seconds, self.earlier_cpu_seconds = state_dict["seconds"], state_dict["cpu_seconds"]

    def _read(self) -> None:
        self.seconds = self.earlier_seconds + time.monotonic() - self._begin
        self.cpu_seconds = self.earlier_cpu_seconds + time.process_time() - self._cpu_begin


class Heartbeat(Callback):
    """Writes time and step to the trial once a minute, so that others see that its process lives and how far it is.

    Args:
        trial: the trial.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._noted = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note with which step the training begins."""
        self.trial.set_user_attr(START_STEP, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """See the class."""
        self._beat(trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """See the class."""
        self._beat(trainer.global_step)

    def _beat(self, step: int) -> None:
        if time.monotonic() - self._noted > HEARTBEAT_SECONDS:
            self._noted = time.monotonic()
            self.trial.set_user_attr(HEARTBEAT_STEP, step)
            self.trial.set_user_attr(HEARTBEAT, time.time())


class PruneAtValidation(Callback):
    """Reports every validation to the study, whose pruner may stop the training, on all ranks at once.

    The last validation never prunes: a finished training is a result.

    Args:
        metric: tag of the reported metric.
        trial: receives the reports on rank 0; None on other ranks, which follow its decision.

    Attributes:
        pruned: whether the training was stopped.
    """

    def __init__(self, metric: str = "", trial: Trial | None = None) -> None:
        self.metric = metric
        self.trial = trial
        self.pruned = False
        self._reports: dict[int, float] = {}

    def state_dict(self) -> dict[str, dict[int, float]]:
        """The reports until now."""
        return {"reports": dict(self._reports)}

    def load_state_dict(self, state_dict: dict[str, dict[int, float]]) -> None:
        """Report again, to another trial, what the interrupted one had reported."""
        for step, value in state_dict["reports"].items():
            self._report(value, step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report and decide on rank 0, and broadcast the decision.

        Raises:
            ValueError: the metric was not logged.
        """
        if self.trial is not None:
            require_metric(self.metric, trainer)
        if trainer.sanity_checking:
            return
        pruned = False
        if self.trial is not None:
            self._report(float(trainer.callback_metrics[self.metric]), trainer.global_step)
            pruned = trainer.global_step < trainer.max_steps and self.trial.should_prune()
        self.pruned = trainer.strategy.broadcast(pruned)
        if self.pruned:
            trainer.should_stop = True

    def _report(self, value: float, step: int) -> None:
        assert self.trial is not None
        self._reports[step] = value
        self.trial.report(value, step)


def require_metric(metric: str, trainer: Trainer) -> None:
    """Refuse a metric that the last validation has not logged.

    Raises:
        ValueError: with the tags that it has logged.
    """
    if metric not in trainer.callback_metrics:
        raise ValueError(
            f"expected a validation that logs objective.metric {metric}, found "
            f"{sorted(tag for tag in trainer.callback_metrics if '/position_' not in tag)}"
        )
