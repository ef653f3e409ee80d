"""How a training of several processes ends early: all of them behind the same step, or each for itself."""

from __future__ import annotations

import signal
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ptp_lightning.training.training_module import NotFiniteError


class TerminateTogether(Callback):
    """Stops all processes before the next step when one of them has received SIGTERM.

    Lightning's own handler talks to the other processes while it handles the signal. That may cross with what they
    exchange about gradients, and then all wait for ever (Lightning issue 20806). Here the handler only takes note, and
    processes ask each other where all of them come by. A single process is left to Lightning.

    A process that fails by itself ends at once, and whoever started them ends the others. It must not write a
    checkpoint, which takes all of them, while these wait for it somewhere else: the one to go on from is the last that
    was written.
    """

    def __init__(self) -> None:
        self._received = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler, which it has registered by now and removes itself."""
        if trainer.world_size > 1:
            self._received = False
            signal.signal(signal.SIGTERM, self._take_note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run like Lightning does, before this batch.

        Raises:
            SIGTERMException: one of the processes has received the signal.
        """
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._received, all=False):
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep checkpoint callbacks, whose turn is next, from waiting for processes that do not come; name these."""
        if trainer.world_size == 1 or isinstance(exception, (SIGTERMException, NotFiniteError)):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False
        # Of processes that this one has started; others belong to whoever started all of them, and tells.
        for local_rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
            if process.poll():
                print(
                    f"error: process {local_rank} of this node has ended, {_how(process.returncode)}", file=sys.stderr
                )

    def _take_note(self, *_: Any) -> None:
        self._received = True


def _how(status: int) -> str:
    """What an exit status other than 0 says."""
    return f"with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
