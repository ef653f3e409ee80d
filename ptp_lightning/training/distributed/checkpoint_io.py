"""AtomicCheckpointIO: a checkpoint is written completely or not at all, and runs no code when it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from ptp_lightning.utils.atomic_files import atomic_write
from ptp_lightning.utils.pretrained import clear_errors, require_torch_file

VERSION_KEY = "pytorch-lightning_version"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads weights and plain data only, and writes atomically.

    Lightning unpickles the whole file if its path is a URL, which runs any code that the file names.

    It writes a checkpoint to a temporary file in the same folder and then renames it.

    Lightning writes to the system's temporary folder. If that is on another disk, the file is copied over the earlier
    checkpoint, which is lost if the disk is full or the process dies meanwhile; and the whole file is held in memory.
    On remote file systems (`s3://`) this class uses Lightning's implementation.
    """

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `CheckpointIO.load_checkpoint`; `weights_only` is always true.

        Raises:
            FileNotFoundError: nothing is at `path`.
            ValueError: the file is no checkpoint, is not complete, or holds more than weights and plain data.
        """
        if Path(path).is_file():
            require_torch_file(Path(path), "ckpt_path")
        with clear_errors(path, "ckpt_path"):
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
        if not isinstance(checkpoint, dict) or VERSION_KEY not in checkpoint:
            raise ValueError(f"expected a checkpoint of fit, found {path}, which holds something else: set ckpt_path")
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: the file cannot be written; an earlier file of this name is unchanged.
        """
        if storage_options is not None or "local" not in get_filesystem(path).protocol:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(os.fspath(path).removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(target) as file:
                torch.save(checkpoint, file)
        except BaseException as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise OSError(
                reason.errno,
                f"the checkpoint {target} could not be written ({reason.strerror}); "
                f"{'the earlier file is unchanged' if target.exists() else 'there is no earlier file'}: free disk "
                "space, or change the folder of the logger or of ModelCheckpoint.dirpath",
            ) from error


def _reason(error: BaseException | None) -> OSError | None:
    """The operating system's error that caused an error of torch, which raises its own while it closes the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
