"""Records are read after a kill, and belong to one evaluation."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ptp_lightning.evaluation.records import RECORDS_FILE, RUN_FILE, Record, RecordFile

RUN = {"seeds": 2, "temperatures": [0.7, 1.0]}
RECORD = Record("q1", "math", 0, 0, 0.7, "speculative", 9, 0, [4, 5], 3, 0.5, {"forward": 0.4}, 100, [2], [4], [3])


def test_written_records_are_read(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "new", RUN)
    records = [RECORD, replace(RECORD, seed=1), replace(RECORD, decoder="transformers", phases={})]
    for record in records:
        file.append(record)
    again = RecordFile(tmp_path / "new", RUN)
    assert list(again.records.values()) == list(file.records.values()) == records
    assert list(again.records) == [record.key for record in records]


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_an_incomplete_line_is_truncated(kept: int, tmp_path: Path) -> None:
    file = RecordFile(tmp_path, RUN)
    file.append(RECORD)
    file.append(replace(RECORD, seed=1))
    path = tmp_path / RECORDS_FILE
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    again = RecordFile(tmp_path, RUN)
    assert list(again.records.values()) == [RECORD]
    again.append(replace(RECORD, seed=1))
    assert path.read_bytes() == first + second


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000], ids=lambda content: content[:3])
@pytest.mark.parametrize("name", [RUN_FILE, RECORDS_FILE])
def test_unreadable_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    """As an early version left them on a full disk."""
    RecordFile(tmp_path, RUN).append(RECORD)
    (tmp_path / name).write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=rf"{name}.*expected a JSON object, found .*choose another --output"):
        RecordFile(tmp_path, RUN)


def test_a_full_disk_leaves_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        RecordFile(tmp_path, RUN)
    assert not list(tmp_path.iterdir())


def test_another_evaluation_is_rejected(tmp_path: Path) -> None:
    RecordFile(tmp_path, RUN)
    with pytest.raises(ValueError, match=r"seeds 2, found 3: choose another --output"):
        RecordFile(tmp_path, RUN | {"seeds": 3})
    with pytest.raises(ValueError, match=r"top_k None, found 5"):
        RecordFile(tmp_path, RUN | {"top_k": 5})


def test_invalid_files_are_rejected(tmp_path: Path) -> None:
    RecordFile(tmp_path, RUN)
    (tmp_path / RECORDS_FILE).write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1: expected a record"):
        RecordFile(tmp_path, RUN)
    (tmp_path / RUN_FILE).unlink()
    with pytest.raises(ValueError, match=r"expected .*run\.json beside"):
        RecordFile(tmp_path, RUN)
