"""The folders of a run: whether they can be written, where its configuration and its newest checkpoint are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from ptp_lightning.utils.atomic_files import write_atomically

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer
    from lightning.pytorch.loggers import Logger

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"  # the folder in which `ModelCheckpoint` writes by default
LAST_CHECKPOINTS = "last*.ckpt"


class SaveRunConfig(SaveConfigCallback):
    """Writes the complete configuration into the run's own folder, and nowhere else.

    Lightning writes it to the current folder where there is no logger, over a file of the same name, and to the folder
    of all runs with loggers such as W&B.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, on rank zero, if the run has a folder."""
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero or self.already_saved:
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_unset=False, skip_validation=True)  # it is what was parsed
        write_atomically(folder / CONFIG_FILE, text.encode())
        self.already_saved = True


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of the run's first logger that writes files; None without one."""
    folders = (_folder(logger, trainer) for logger in trainer.loggers)
    return next((folder for folder in folders if folder is not None), None)


def require_writable_folders(trainer: Trainer) -> None:
    """Make the folders of loggers and checkpoints now; without this, some are written first after hours of training.

    Raises:
        ValueError: one cannot be made or written.
    """
    folders = [("trainer.logger.init_args.save_dir", logger.save_dir) for logger in trainer.loggers]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            folders.append(("checkpoint.dirpath", callback.dirpath and str(callback.dirpath)))
    for key, folder in folders:
        if not folder or "://" in folder:
            continue
        reason = "no permission"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                continue
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        raise ValueError(f"expected a folder that can be written, found {folder} ({reason}): set {key}")


def newest_checkpoint(trainer: Trainer) -> Path | None:
    """The newest `last.ckpt` of the runs with the name of this one; None if there is none."""
    candidates: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            candidates += Path(callback.dirpath).glob(LAST_CHECKPOINTS)
    parents = [parent for logger in trainer.loggers if (parent := _parent(logger, trainer)) is not None]
    for parent in parents:
        candidates += parent.glob(f"*/{CHECKPOINTS}/{LAST_CHECKPOINTS}")
    if not parents:  # runs without a logger, or with one that gives them no name, share this folder
        candidates += (Path(trainer.default_root_dir) / CHECKPOINTS).glob(LAST_CHECKPOINTS)
    return max(candidates, key=os.path.getmtime, default=None)


def _folder(logger: Logger, trainer: Trainer) -> Path | None:
    own = getattr(logger, "log_dir", None)
    if isinstance(own, str | os.PathLike):
        return Path(own)
    parent = _parent(logger, trainer)
    return None if parent is None or logger.version is None else parent / str(logger.version)


def _parent(logger: Logger, trainer: Trainer) -> Path | None:
    """The folder of the runs of this name, as `ModelCheckpoint` finds it for loggers without files, too."""
    own = getattr(logger, "log_dir", None)
    if isinstance(own, str | os.PathLike):
        return Path(own).parent
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return Path(root, logger.name) if logger.name else None
