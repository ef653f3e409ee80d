"""How a training of several processes ends early: all of them behind the same step, or each for itself."""

from __future__ import annotations

import signal
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ptp_lightning.training.modules.training_module import NotFiniteError


class TerminateTogether(Callback):
    """Stops all processes before the next step when one of them has received SIGTERM, or Ctrl-C.

    Lightning's own handler talks to the other processes while it handles the signal. That may cross with what they
    exchange about gradients, and then all wait for ever (Lightning issue 20806). Here the handler only takes note, and
    processes ask each other where all of them come by. A single process is left to Lightning.

    A process that fails by itself ends at once, and whoever started them ends the others. It must not write a
    checkpoint, which takes all of them, while these wait for it somewhere else: the one to go on from is the last that
    was written. A second Ctrl-C does the same.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_agreed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of the handlers: of Lightning's, which it removes itself, and of Python's."""
        if trainer.world_size > 1:
            self._received, self._is_agreed = None, False
            for sent in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sent, self._take_note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run like Lightning does, before this batch.

        Raises:
            SIGTERMException: one of the processes has received the signal.
            KeyboardInterrupt: this one was interrupted.
        """
        if trainer.world_size == 1:
            return
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._is_agreed = True
            raise KeyboardInterrupt if self._received == signal.SIGINT else SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep checkpoint callbacks, whose turn is next, from waiting for processes that do not come; name these."""
        if trainer.world_size == 1 or self._is_agreed or isinstance(exception, NotFiniteError):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False
        # Of processes that this one has started; others belong to whoever started all of them, and tells.
        for local_rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
            if process.poll():
                ended = f"process {local_rank} of this node has ended, {_how(process.returncode)}"
                print(f"error: {ended}", file=sys.stderr)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if signal.getsignal(signal.SIGINT) == self._take_note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take_note(self, sent: int, *_: Any) -> None:
        self._received = sent
        if sent == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _how(status: int) -> str:
    """What an exit status other than 0 says."""
    return f"with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
