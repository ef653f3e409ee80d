"""File locks with which processes on one or several machines divide work in a shared folder, without a server.

A lock is a file that only one process can create. It holds its owner, and the owner refreshes its modification time.
Another process takes the lock over when the owner is dead, also after `kill -9`, or has been silent for
`STALE_SECONDS`, also on another host. After a long pause of its owner, two processes can hold the same lock. The locks
save duplicate work and must not guard data; files are written atomically (see `atomic_files`).

Why not the library `filelock`: its `FileLock` depends on flock, which network file systems offer only in part, and its
`SoftFileLease` replaces a stale lock by renameat2(RENAME_EXCHANGE), which NFS refuses, so that the lock of a killed
process would stay for ever (tried with version 4.3).
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from ptp_lightning.utils.atomic_files import temporary_path

LOCK_SUFFIX = ".lock"
STALE_SECONDS = 300.0  # a lock that was not refreshed for this long is taken over, whatever host its owner is on
OWNERLESS_SECONDS = 10.0  # the same for a lock file without an owner: its process was killed while writing it
REFRESH_SECONDS = 15.0
START_TOLERANCE_SECONDS = 10.0  # the reported start time of a process moves when the clock is adjusted


@dataclass(frozen=True)
class LockOwner:
    """A process, identified beyond the reuse of its process id.

    Attributes:
        host: host name.
        pid: process id.
        started: start time in seconds since 1970.

    >>> LockOwner.current().is_dead()
    False
    """

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(platform.node(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; never true for processes of other hosts."""
        if self.host != platform.node():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > START_TOLERANCE_SECONDS
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class FileLock:
    """The exclusive lock for producing one file, held by this process.

    Args:
        path: the lock file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     lock = FileLock.try_acquire(Path(folder) / "shard.parquet")
    ...     second = FileLock.try_acquire(Path(folder) / "shard.parquet")
    ...     lock.release()
    >>> lock is not None, second is not None
    (True, False)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refreshed = time.monotonic()

    @classmethod
    def try_acquire(cls, target: Path) -> FileLock | None:
        """The lock for producing `target`, or None while another process holds it.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = target.with_suffix(LOCK_SUFFIX)
        if not _create(path):
            if not _is_stale(path, target):
                return None
            path.unlink(missing_ok=True)
            if not _create(path):  # another process took it over first
                return None
        return cls(path)

    def refresh(self) -> None:
        """Show that the owner is still at work; cheap enough to call for every token."""
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(self._path)

    def release(self) -> None:
        """Remove the lock file."""
        self._path.unlink(missing_ok=True)


def remove_locks(folder: Path) -> None:
    """Remove the locks of killed processes; to be called when no work is left in the folder."""
    for path in folder.glob(f"*{LOCK_SUFFIX}"):
        path.unlink(missing_ok=True)


def _create(path: Path) -> bool:
    """Create a lock file that names this process as the owner; False if the file exists."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(LockOwner.current()) | {"acquired": time.time()}, file)
    except BaseException:  # for example a full disk; an ownerless lock would only delay others
        path.unlink(missing_ok=True)
        raise
    return True


def _is_stale(path: Path, target: Path) -> bool:
    """Whether the owner is dead or silent; if so, its unfinished file is removed."""
    try:
        age = time.time() - path.stat().st_mtime
        entry = json.loads(path.read_text(encoding="utf-8"))
        owner = LockOwner(entry["host"], entry["pid"], entry["started"])
    except FileNotFoundError:  # released in the meantime
        return True
    except (ValueError, KeyError, TypeError):
        return age > OWNERLESS_SECONDS
    is_stale = age > STALE_SECONDS or owner.is_dead()
    if is_stale:
        temporary_path(target, owner.host, owner.pid).unlink(missing_ok=True)
    return is_stale
