"""KnownMonitors: a misspelt metric to stop by, or to choose checkpoints by, is noticed before the first step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

VALIDATION = "val"  # how people begin the names of metrics of a validation


class KnownMonitors(Callback):
    """Compares `monitor` of all callbacks with what the validation before the first step has logged.

    Lightning does so at the first check, which may be hours later. Only names that begin with `val` are compared: what
    a training step will log is not known yet.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See the class.

        Raises:
            ValueError: a callback monitors a metric that no validation logs.
        """
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  Lightning adds them
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith(VALIDATION) and monitor not in trainer.callback_metrics:
                raise ValueError(unknown_monitor(type(callback).__name__, monitor, list(trainer.callback_metrics)))


def unknown_monitor(callback: str, monitor: str, metrics: list[str]) -> str:
    """The message on a metric that there is not.

    >>> unknown_monitor("EarlyStopping", "val_loss", ["val/nats", "val/accuracy/position_00", "loss"])
    'expected a metric of this run as monitor of EarlyStopping in trainer.callbacks, found val_loss: set it to val/nats'
    """
    names = [name for name in metrics if "/" in name and "/position_" not in name]
    one_of = "one of " if len(names) > 1 else ""
    return (
        f"expected a metric of this run as monitor of {callback} in trainer.callbacks, found {monitor}: set it to "
        f"{one_of}{', '.join(names)}"
    )
