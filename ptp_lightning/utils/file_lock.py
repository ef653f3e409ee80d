"""Claims: how processes that share a folder divide the work, on one machine or several, without a server.

A claim is a file that only one process can create. That of a dead process is taken over. Two processes may still come
to hold the same claim, after a long pause of one of them for instance: claims save work, they guard nothing.
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

CLAIM_SUFFIX = ".claim"
STALE_SECONDS = 300.0  # a claim that was not touched for so long is given up, wherever its owner lives
UNNAMED_SECONDS = 10.0  # the same while it has no name in it: its owner was killed over writing it
TOUCH_SECONDS = 15.0
START_TOLERANCE_SECONDS = 10.0  # a system's account of when a process began moves with its clock


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: where it runs.
        pid: its number there.
        started: when it began, in seconds since 1970: numbers are used again.
    """

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(platform.node(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Whether it is known to have ended; of other hosts' processes it never is."""
        if self.host != platform.node():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > START_TOLERANCE_SECONDS
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class Claim:
    """This process' claim to make a file.

    Args:
        path: of the claim.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._touched = time.monotonic()

    @classmethod
    def take(cls, target: Path) -> Claim | None:
        """The claim to make `target`, or None while another process has it.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = target.with_suffix(CLAIM_SUFFIX)
        if not _create(path):
            if not _is_given_up(path, target):
                return None
            path.unlink(missing_ok=True)
            if not _create(path):  # another process was faster
                return None
        return cls(path)

    def touch(self) -> None:
        """Show that the work goes on; cheap enough for every token."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(self._path)

    def release(self) -> None:
        """Give the claim back: the file is made, or somebody else shall make it."""
        self._path.unlink(missing_ok=True)


def remove_claims(folder: Path) -> None:
    """Remove what killed processes left behind; for when there is nothing to claim any more."""
    for path in folder.glob(f"*{CLAIM_SUFFIX}"):
        path.unlink(missing_ok=True)


def _create(path: Path) -> bool:
    """Create a claim with this process' name in it, unless there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(Owner.current()) | {"claimed": time.time()}, file)
    except BaseException:  # a full disk; an empty claim would only be in the way
        path.unlink(missing_ok=True)
        raise
    return True


def _is_given_up(path: Path, target: Path) -> bool:
    """Whether the owner is dead or silent; then the file it was writing is removed."""
    try:
        age = time.time() - path.stat().st_mtime
        entry = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(entry["host"], entry["pid"], entry["started"])
    except FileNotFoundError:  # released just now
        return True
    except (ValueError, KeyError, TypeError):
        return age > UNNAMED_SECONDS
    given_up = age > STALE_SECONDS or owner.is_dead()
    if given_up:
        temporary_path(target, owner.host, owner.pid).unlink(missing_ok=True)
    return given_up
