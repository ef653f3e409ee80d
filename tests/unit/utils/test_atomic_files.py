"""A file is there whole or not at all, on a full disk too."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptp_lightning.data.completions.completions import CompletionFolder
from ptp_lightning.utils.atomic_files import remove_unfinished, temporary_path, write_atomically
from tests.helpers.tiny_completions import synthetic_completions, tiny_settings


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond; what is written up to there is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


def test_nothing_is_left_when_there_is_no_room(tmp_path: Path) -> None:
    with room_for(1000), pytest.raises(OSError, match="too large"):
        write_atomically(tmp_path / "a", b"x" * 2000)
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_when_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_shard_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = CompletionFolder.create(tmp_path, tiny_settings())
    with room_for(500), pytest.raises(OSError, match="too large"):
        folder.write_shard(0, synthetic_completions(folder.settings, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["completions.json"]
    folder.write_shard(0, synthetic_completions(folder.settings, 0))
    assert folder.missing_shards() == [1, 2]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    temporary_path(tmp_path / "a", "elsewhere", 7).write_bytes(b"ha")
    write_atomically(tmp_path / "b", b"whole")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
