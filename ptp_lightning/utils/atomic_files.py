"""Atomic writes: a file or folder appears with its whole content or not at all, even if its writer is killed."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".unfinished"


def temporary_path(path: Path, host: str, pid: int) -> Path:
    """The hidden file beside `path` to which one process writes first.

    >>> temporary_path(Path("shard.parquet"), "node1", 7).name
    '.shard.parquet.node1.7.unfinished'
    """
    return path.with_name(f".{path.name}.{host}.{pid}{TEMPORARY_SUFFIX}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file by `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, flush it to the disk, and rename it to `path`.

    Several processes may write the same content to `path` at the same time.

    Raises:
        OSError: no space or no permission; no temporary file is left.
    """
    temporary = temporary_path(path, platform.node(), os.getpid())
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileNotFoundError:  # removed by a process that found all files finished
        if not path.is_file():
            raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder that replaces `target` at the end of the block, or is removed on any error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        draft, old = Path(scratch) / "new", Path(scratch) / "old"
        draft.mkdir()  # with the usual permissions, unlike the folder around it
        yield draft
        if target.exists():
            target.rename(old)
        try:
            draft.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of killed processes; to be called when no process writes to the folder."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the renaming to the disk where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
