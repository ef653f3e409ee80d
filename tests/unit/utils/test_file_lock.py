"""Claims: one process has a shard, and a dead one loses it."""

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

from ptp_lightning.utils import file_lock as claims
from ptp_lightning.utils.atomic_files import temporary_path
from ptp_lightning.utils.file_lock import STALE_SECONDS, UNNAMED_SECONDS, Claim, Owner, remove_claims


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "shard-00012.parquet"


def leave(shard: Path, owner: Owner, seconds_ago: float = 0.0) -> Path:
    """The claim of a process that wrote it so long ago."""
    path = shard.with_suffix(".claim")
    path.write_text(json.dumps(asdict(owner)))
    touched = time.time() - seconds_ago
    os.utime(path, (touched, touched))
    return path


def dead() -> Owner:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(Owner.current(), pid=process.pid)


def test_only_one_has_it(shard: Path) -> None:
    claim = Claim.take(shard)
    assert claim is not None
    assert Claim.take(shard) is None
    stored = json.loads(shard.with_suffix(".claim").read_text())
    assert (stored["host"], stored["pid"]) == (platform.node(), os.getpid())
    claim.release()
    assert list(shard.parent.iterdir()) == []
    assert Claim.take(shard) is not None


def test_that_of_a_dead_process_is_taken_over_at_once(shard: Path) -> None:
    owner = dead()
    leave(shard, owner)
    half = temporary_path(shard, owner.host, owner.pid)
    half.write_bytes(b"half a sh")
    assert Claim.take(shard) is not None
    assert not half.exists()
    assert json.loads(shard.with_suffix(".claim").read_text())["pid"] == os.getpid()


def test_that_of_a_process_whose_number_is_used_again(shard: Path) -> None:
    leave(shard, replace(Owner.current(), started=Owner.current().started - 1000.0))
    assert Claim.take(shard) is not None


@pytest.mark.parametrize("host", [platform.node(), "elsewhere"])
def test_that_of_a_silent_process_is_taken_over_after_a_while(shard: Path, host: str) -> None:
    owner = replace(Owner.current(), host=host)
    leave(shard, owner, seconds_ago=STALE_SECONDS / 2)
    assert Claim.take(shard) is None
    leave(shard, owner, seconds_ago=STALE_SECONDS * 2)
    assert Claim.take(shard) is not None


def test_a_claim_without_a_name_counts_for_a_moment(shard: Path) -> None:
    path = shard.with_suffix(".claim")
    path.write_text("")
    assert Claim.take(shard) is None
    touched = time.time() - 2 * UNNAMED_SECONDS
    os.utime(path, (touched, touched))
    assert Claim.take(shard) is not None


def test_work_that_goes_on_keeps_it(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim.take(shard)
    assert claim is not None
    path = shard.with_suffix(".claim")
    os.utime(path, (0, 0))
    claim.touch()
    assert path.stat().st_mtime == 0  # too soon to be worth a call
    monkeypatch.setattr(claims, "TOUCH_SECONDS", -1.0)
    claim.touch()
    assert time.time() - path.stat().st_mtime < STALE_SECONDS
    path.unlink()
    claim.touch()  # taken over and finished by another: no reason to stop
    claim.release()


def test_all_are_removed_in_the_end(shard: Path) -> None:
    leave(shard, dead())
    remove_claims(shard.parent)
    assert list(shard.parent.iterdir()) == []
