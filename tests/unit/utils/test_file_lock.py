"""File locks: one process holds the lock of a shard, and a dead or silent process loses it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ptp_lightning.utils import file_lock
from ptp_lightning.utils.atomic_files import temporary_path
from ptp_lightning.utils.file_lock import OWNERLESS_SECONDS, STALE_SECONDS, FileLock, LockOwner, remove_locks


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "shard-00012.parquet"


def write_lock(shard: Path, owner: LockOwner, seconds_ago: float = 0.0) -> Path:
    """The lock file of an owner who refreshed it last `seconds_ago`."""
    path = shard.with_suffix(".lock")
    path.write_text(json.dumps(asdict(owner)))
    refreshed = time.time() - seconds_ago
    os.utime(path, (refreshed, refreshed))
    return path


def dead_owner() -> LockOwner:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(LockOwner.current(), pid=process.pid)


def test_only_one_process_holds_the_lock(shard: Path) -> None:
    lock = FileLock.try_acquire(shard)
    assert lock is not None
    assert FileLock.try_acquire(shard) is None
    stored = json.loads(shard.with_suffix(".lock").read_text())
    assert (stored["host"], stored["pid"]) == (platform.node(), os.getpid())
    lock.release()
    assert list(shard.parent.iterdir()) == []
    assert FileLock.try_acquire(shard) is not None


def test_the_lock_of_a_dead_process_is_taken_over_at_once(shard: Path) -> None:
    owner = dead_owner()
    write_lock(shard, owner)
    unfinished = temporary_path(shard, owner.host, owner.pid)
    unfinished.write_bytes(b"half a sh")
    assert FileLock.try_acquire(shard) is not None
    assert not unfinished.exists()
    assert json.loads(shard.with_suffix(".lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(shard: Path) -> None:
    program = "import sys, time, pathlib; from ptp_lightning.utils.file_lock import FileLock"
    program += "; FileLock.try_acquire(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, str(shard)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert FileLock.try_acquire(shard) is None
        holder.kill()
    assert FileLock.try_acquire(shard) is not None


def test_a_reused_process_id_does_not_keep_the_lock(shard: Path) -> None:
    write_lock(shard, replace(LockOwner.current(), started=LockOwner.current().started - 1000.0))
    assert FileLock.try_acquire(shard) is not None


@pytest.mark.parametrize("host", [platform.node(), "elsewhere"])
def test_the_lock_of_a_silent_process_becomes_stale(shard: Path, host: str) -> None:
    owner = replace(LockOwner.current(), host=host)
    write_lock(shard, owner, seconds_ago=STALE_SECONDS / 2)
    assert FileLock.try_acquire(shard) is None
    write_lock(shard, owner, seconds_ago=STALE_SECONDS * 2)
    assert FileLock.try_acquire(shard) is not None


def test_a_lock_without_an_owner_is_valid_for_some_seconds(shard: Path) -> None:
    path = shard.with_suffix(".lock")
    path.write_text("")
    assert FileLock.try_acquire(shard) is None
    refreshed = time.time() - 2 * OWNERLESS_SECONDS
    os.utime(path, (refreshed, refreshed))
    assert FileLock.try_acquire(shard) is not None


def test_refreshing_keeps_the_lock(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FileLock.try_acquire(shard)
    assert lock is not None
    path = shard.with_suffix(".lock")
    os.utime(path, (0, 0))
    lock.refresh()
    assert path.stat().st_mtime == 0  # too soon to be worth a system call
    monkeypatch.setattr(file_lock, "REFRESH_SECONDS", -1.0)
    lock.refresh()
    assert time.time() - path.stat().st_mtime < STALE_SECONDS
    path.unlink()
    lock.refresh()  # taken over and finished by another process: no reason to stop
    lock.release()


def test_all_locks_are_removed_when_no_work_is_left(shard: Path) -> None:
    write_lock(shard, dead_owner())
    remove_locks(shard.parent)
    assert list(shard.parent.iterdir()) == []
