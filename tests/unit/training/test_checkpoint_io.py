"""A checkpoint that cannot be written completely leaves the earlier one unchanged."""

from __future__ import annotations

import errno
import functools
import http.server
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ptp_lightning.training.distributed.checkpoint_io import AtomicCheckpointIO


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 100 kB."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead, as on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def earlier(folder: Path) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(3)}, path)
    return path


def is_unchanged(path: Path) -> bool:
    return torch.load(path, weights_only=True)["weight"].tolist() == [0, 0, 0] and list(path.parent.iterdir()) == [path]


def test_a_checkpoint_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    path = earlier(tmp_path)
    permissions = path.stat().st_mode
    AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(2)}, path)
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 1]
    assert list(path.parent.iterdir()) == [path]
    other = tmp_path / "other"
    other.touch()
    assert permissions == path.stat().st_mode == other.stat().st_mode


def test_a_full_disk(tmp_path: Path) -> None:
    path = earlier(tmp_path)
    with pytest.raises(OSError, match="File too large") as raised, full_disk():
        AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(1_000_000)}, path)
    message = f"{path} could not be written (File too large); the earlier file is unchanged: free disk space"
    assert message in str(raised.value)
    assert is_unchanged(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_writer_that_stops_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    path = earlier(tmp_path)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error), match="" if isinstance(error, KeyboardInterrupt) else "No space left on device"):
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert is_unchanged(path)


def test_it_is_on_disk_before_it_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = earlier(tmp_path), []
    monkeypatch.setattr("os.fsync", lambda descriptor: events.append("sync"))
    monkeypatch.setattr(Path, "replace", lambda draft, target: events.append(f"{target.name} replaced"))
    AtomicCheckpointIO().save_checkpoint({}, path)
    assert events == ["sync", "last.ckpt replaced", "sync"]


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "URL"])
def test_reading_runs_no_code(remote: bool, tmp_path: Path) -> None:
    file = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {}, "hostile": RunsCode(tmp_path / "proof")}, file)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = f"http://127.0.0.1:{server.server_port}/{file.name}" if remote else file
        with pytest.raises(ValueError, match="ckpt_path=.*hostile.ckpt cannot be read: .*, which could run code"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
        server.shutdown()
    assert not (tmp_path / "proof").exists()
