"""TerminateTogether: how a training ends early."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ptp_lightning.training.modules.training_module import NotFiniteError

STDERR = 2  # its file descriptor: a signal handler may interrupt a print, and must not print itself


class TerminateTogether(Callback):
    """Stops all processes before the next optimiser step after one of them has received SIGTERM or SIGINT (Ctrl-C).

    Python and Lightning would stop anywhere, also while weights are updated, so that a checkpoint written then could be
    half a step ahead. Lightning's handler also calls collective operations, which can interleave with the reduction of
    gradients, and the processes deadlock (Lightning issue 20806). Here the handler only records the signal; the
    processes exchange it at the start of each step. A second Ctrl-C stops at once.

    A process that fails by itself ends at once, and its launcher ends the others. It must not write a checkpoint, which
    is a collective operation, while the others wait in another one; the run resumes from the last checkpoint. A second
    Ctrl-C has the same effect.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._all_agreed = False

    @property
    def stopped_between_steps(self) -> bool:
        """Whether a signal has ended the training between two steps, so that a checkpoint holds whole steps."""
        return self._all_agreed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handlers of Lightning, which Lightning removes itself, and of Python."""
        self._received, self._all_agreed = None, False
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for sent in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sent, self._record)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run before this batch if a process has received a signal.

        Raises:
            SIGTERMException: one of the processes has received a signal.
            KeyboardInterrupt: this process has received SIGINT.
        """
        if batch_idx % trainer.accumulate_grad_batches:
            return
        stop = self._received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
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
            os.write(STDERR, b"\nStopping before the next step; Ctrl-C again stops at once\n")


def _describe(status: int) -> str:
    """An exit status other than 0 in words."""
    return f"with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
