"""Files that are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".unfinished"


def temporary_path(path: Path, host: str, pid: int) -> Path:
    """What a process calls `path` before it is whole: hidden, beside it, and no other process' name for it."""
    return path.with_name(f".{path.name}.{host}.{pid}{TEMPORARY_SUFFIX}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as in `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write, reach the disk, and only then take the name; another process may write the same content meanwhile.

    Raises:
        OSError: no room, no permission; nothing is left behind.
    """
    temporary = temporary_path(path, platform.node(), os.getpid())
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileNotFoundError:  # swept up by a process that had found everything finished
        if not path.is_file():
            raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left behind; for when nobody has anything to write any more."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk, too, where the system knows how to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
