"""TerminateTogether: how a training of several processes ends early."""

from __future__ import annotations

import signal
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ptp_lightning.training.modules.training_module import NotFiniteError


class TerminateTogether(Callback):
    """Stops all processes before the next step after one of them has received SIGTERM or SIGINT (Ctrl-C).

    Lightning's own signal handler calls collective operations. These can interleave with the reduction of gradients,
    and the processes deadlock (Lightning issue 20806). Here the handler only records the signal; the processes exchange
    it at the start of each batch. With a single process Lightning's handler is used.

    A process that fails by itself ends at once, and its launcher ends the others. It must not write a checkpoint, which
    is a collective operation, while the others wait in another one; the run resumes from the last checkpoint. A second
    Ctrl-C has the same effect.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._all_agreed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handlers of Lightning, which Lightning removes itself, and of Python."""
        if trainer.world_size > 1:
            self._received, self._all_agreed = None, False
            for sent in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sent, self._record)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run before this batch if a process has received a signal.

        Raises:
            SIGTERMException: one of the processes has received a signal.
            KeyboardInterrupt: this process has received SIGINT.
        """
        if trainer.world_size == 1:
            return
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._all_agreed = True
            raise KeyboardInterrupt if self._received == signal.SIGINT else SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prevent checkpoint callbacks from waiting for processes that have ended; print which have."""
        if trainer.world_size == 1 or self._all_agreed or isinstance(exception, NotFiniteError):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False
        # Processes that this one has started; an external launcher reports its own.
        for local_rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
            if process.poll():
                ended = f"process {local_rank} of this node has ended, {_describe(process.returncode)}"
                print(f"error: {ended}", file=sys.stderr)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the handler of Ctrl-C."""
        if signal.getsignal(signal.SIGINT) == self._record:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _record(self, sent: int, *_: Any) -> None:
        self._received = sent
        if sent == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _describe(status: int) -> str:
    """An exit status other than 0 in words."""
    return f"with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
