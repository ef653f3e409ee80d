"""What happens if a run cannot write its log, on a full disk for instance: one line, and no half-written row."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import CSVLogger

from ptp_lightning.training.run_folder import run_folder

if TYPE_CHECKING:
    from lightning import Trainer

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def plain_disk_errors(trainer: Trainer) -> Iterator[None]:
    """Raise errors of a disk with the folder of the run and the key that changes it.

    TensorBoard writes in a thread, whose traceback is not printed: its error comes with the next metrics, where
    Lightning takes it for an error of theirs, or not at all.

    Raises:
        OSError: the run could not be written.
    """
    in_threads: list[OSError] = []
    usual = threading.excepthook

    def record(failed: threading.ExceptHookArgs) -> None:
        reason = _disk_error(failed.exc_value)
        if reason is None:
            usual(failed)
        else:
            in_threads.append(reason)

    threading.excepthook = record
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None or reason.strerror != os.strerror(reason.errno or 0):  # else it says what was not written
            raise
        raise _explained(reason, trainer) from error
    finally:
        threading.excepthook = usual
    if in_threads:
        raise _explained(in_threads[0], trainer)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the disk that has led to an error; None if there is none."""
    while error is not None and not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        error = error.__cause__ or error.__context__
    return error


def _explained(reason: OSError, trainer: Trainer) -> OSError:
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            _remove_cut_row(Path(logger.experiment.metrics_file_path))
    folder = run_folder(trainer) or trainer.default_root_dir
    return OSError(
        reason.errno,
        f"the log of the run in {folder} could not be written ({reason.strerror}): free disk space, or set "
        "trainer.logger.init_args.save_dir; --ckpt_path last goes on",
    )


def _remove_cut_row(table: Path) -> None:
    """Shorten a table to whole rows; the numbers of a cut one would be wrong."""
    if table.is_file():
        os.truncate(table, table.read_bytes().rfind(b"\n") + 1)
