"""Checkpoints of a study's trainings: stopped ones continue, and long ones begin with the first steps of short ones.

The rate of a training is constant until it decays at the end (`optimizer.decay_fraction`), and random numbers are keyed
by the step. So until the decay of a training of 200 steps, one of 800 steps is the same training, and continues from
the checkpoint that the former left there. A resumed training equals an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.training.distributed.termination import TerminateTogether
from ptp_lightning.training.modules.training_module import TrainingModule

SAVE_SECONDS = 300.0  # between checkpoints of a training that could be killed
LENGTH_KEYS = (STEPS_KEY, "trainer.val_check_interval")
HASH_DIGITS = 16


class TrialCheckpoints(Callback):
    """Writes the checkpoints of a trial, and finds the one with which it begins.

    Args:
        folder: of all trials that differ in the number of steps only.
        total_steps: of this trial.
        serves_others: keep a checkpoint of the step at which the rate begins to decay, for longer trainings, in place
            of those of earlier steps.

    Attributes:
        start_step: the step of the checkpoint with which the trial began.
        shared_steps: number of first steps that are those of every longer training.
    """

    def __init__(self, folder: Path, total_steps: int, *, serves_others: bool) -> None:
        self.folder = folder
        self.total_steps = total_steps
        self.serves_others = serves_others
        self.start_step = 0
        self.shared_steps = 0
        self._step = 0
        self._saved = time.monotonic()

    def start(self, module: LightningModule) -> Path | None:
        """The checkpoint to begin with: of those whose steps this training shares, the latest; None without one."""
        if isinstance(module, TrainingModule):
            self.shared_steps = module.shared_steps(self.total_steps)
        shared = {step: path for step, path in _steps(self.folder, "shared").items() if step <= self.shared_steps}
        found = shared | self._own()
        self.start_step = max(found, default=0)
        return found.get(self.start_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._step, self._saved = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save after the last shared step, and every few minutes."""
        step = trainer.global_step
        if step == self._step or step >= self.total_steps:  # within a step, or at the end
            return
        self._step = step
        if self.serves_others and step == self.shared_steps:
            self._save(trainer, "shared")
        elif time.monotonic() - self._saved > SAVE_SECONDS:
            self._save(trainer, self._own_name)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if Ctrl-C or SIGTERM stopped the training between two steps."""
        ends = [callback for callback in trainer.callbacks if isinstance(callback, TerminateTogether)]  # pyright: ignore[reportAttributeAccessIssue]
        if any(end.stopped_between_steps for end in ends) and self.start_step < trainer.global_step:
            self._save(trainer, self._own_name)

    def remove_own(self) -> None:
        """Remove the checkpoints that only this trial could use, when it has ended."""
        for path in self._own().values():
            path.unlink(missing_ok=True)

    @property
    def _own_name(self) -> str:
        return f"of_{self.total_steps}"

    def _own(self) -> dict[int, Path]:
        return _steps(self.folder, self._own_name)

    def _save(self, trainer: Trainer, name: str) -> None:
        step = trainer.global_step
        trainer.save_checkpoint(self.folder / f"{name}_step_{step:06d}.ckpt")
        for earlier, path in _steps(self.folder, name).items():
            if earlier < step:
                path.unlink(missing_ok=True)
        self._saved = time.monotonic()


def folder_of(arguments: Sequence[str], base: Mapping[str, Any]) -> str:
    """Name of the folder of all trainings that differ in the number of steps only.

    Args:
        arguments: of `fit`.
        base: what the study's definition says of the base configuration, a file that may change.

    >>> folder_of(["--trainer.max_steps=200", "--a=1"], {}) == folder_of(["--trainer.max_steps=800", "--a=1"], {})
    True
    >>> folder_of(["--a=1"], {"b": 1}) == folder_of(["--a=1"], {"b": 2})
    False
    """
    kept = [one for one in arguments if one.partition("=")[0].removeprefix("--") not in LENGTH_KEYS]
    return hashlib.sha256(json.dumps([kept, base], sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]


def _steps(folder: Path, name: str) -> dict[int, Path]:
    """Checkpoints of a name by their step."""
    pattern = re.compile(rf"{name}_step_(\d+)\.ckpt")
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("*.ckpt"))
    return {int(match[1]): path for match, path in found if match is not None}
