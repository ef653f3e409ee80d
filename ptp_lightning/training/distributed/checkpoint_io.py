"""AtomicCheckpointIO: a checkpoint appears complete or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from ptp_lightning.utils.atomic_files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the earlier one of its name, and only then puts it in its place.

    Lightning writes to the system's folder for temporary files; from another disk the file is then copied onto the
    earlier checkpoint, which is lost if the disk is full or the process ends meanwhile. It also keeps the whole file in
    memory. Where the file system is not a local one (`s3://`), Lightning's own way is taken.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: it cannot be written; an earlier file of this name is as it was.
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
                f"{'the one before is as it was' if target.exists() else 'there was none before'}: make room, or "
                "change the folder of the logger or of ModelCheckpoint.dirpath",
            ) from error


def _reason(error: BaseException | None) -> OSError | None:
    """The error of the operating system behind one that torch raises instead while it closes its file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
