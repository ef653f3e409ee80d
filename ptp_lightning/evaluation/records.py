"""Records: the result of each answer of an evaluation, one JSON line each, so that a killed evaluation continues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ptp_lightning.utils.atomic_files import write_atomically
from ptp_lightning.utils.local_paths import WRITTEN, local_folder

RUN_FILE, RECORDS_FILE = "run.json", "records.jsonl"
ALL_POSITIONS = "all_positions"  # instead of a decoder's name, in records of `correct_tokens_at_all_positions`


class RunKey(NamedTuple):
    """What identifies an answer."""

    question_id: str
    turn: int
    seed: int
    temperature: float
    decoder: str


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        question_id: of the question.
        category: of the question.
        turn: 0 for the first.
        seed: of the auxiliary variables.
        temperature: of the sampling.
        decoder: name of the decoder.
        num_prompt_tokens: length of the prompt.
        num_truncated: number of tokens removed from the start of the prompt.
        token_ids: the answer.
        num_calls: forward passes.
        seconds: wall-clock time.
        phases: seconds by phase; empty for `transformers`.
        peak_bytes: peak memory, allocated on the GPU or else resident.
        correct_per_cycle: see `Decoded`.
        drafted_per_cycle: see `Decoded`.
        committed_per_cycle: see `Decoded`.
    """

    question_id: str
    category: str
    turn: int
    seed: int
    temperature: float
    decoder: str
    num_prompt_tokens: int
    num_truncated: int
    token_ids: list[int]
    num_calls: int
    seconds: float
    phases: dict[str, float]
    peak_bytes: int
    correct_per_cycle: list[int]
    drafted_per_cycle: list[int]
    committed_per_cycle: list[int]

    @property
    def key(self) -> RunKey:
        """See `RunKey`."""
        return RunKey(self.question_id, self.turn, self.seed, self.temperature, self.decoder)


class RecordFile:
    """The records of a folder, which a repeated evaluation reads and completes.

    Args:
        folder: created if it does not exist.
        run: description of the evaluation, which must match that of an existing folder.

    Attributes:
        records: all finished records.

    Raises:
        ValueError: the folder contains another evaluation, or an invalid file, or is a file itself.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        folder = local_folder(folder, "--output", WRITTEN)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORDS_FILE
        stored = stored_run(folder)
        if stored is not None:
            _require_same(stored, json.loads(json.dumps(run)), folder)
        elif self._path.is_file():
            raise ValueError(f"expected {folder / RUN_FILE} beside {self._path}, found none: choose another --output")
        else:
            write_atomically(folder / RUN_FILE, (json.dumps(run, indent=2) + "\n").encode())
        self.records = {record.key: record for record in self._read()}

    def append(self, record: Record) -> None:
        """Write a record immediately."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self.records[record.key] = record

    def _read(self) -> Iterator[Record]:
        if not self._path.is_file():
            return
        text = self._path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):  # killed while writing: this record has to be repeated
            with self._path.open("r+b") as file:
                file.truncate(whole)
        names = {field.name for field in fields(Record)}
        for number, line in enumerate(text[:whole].splitlines(), start=1):
            row = _object_in(line, f"{self._path}, line {number}")
            if row.keys() != names:
                raise ValueError(
                    f"{self._path}, line {number}: expected a record, found {sorted(row)}: choose another --output"
                )
            yield Record(**row)


def stored_run(folder: Path) -> dict[str, Any] | None:
    """The description of the evaluation that a folder contains, None if it contains none.

    Raises:
        ValueError: the file is no JSON object.
    """
    file = folder / RUN_FILE
    return _object_in(file.read_bytes(), str(file)) if file.is_file() else None


def stored_budgets(folder: Path, given: list[int | str]) -> list[int] | None:
    """The slot budgets of the evaluation that a folder contains, None if it contains none.

    Args:
        folder: of the evaluation.
        given: those of this evaluation, for the error.

    Raises:
        ValueError: the file is no JSON object, or has no budgets.
    """
    stored = stored_run(folder)
    if stored is None:
        return None
    budgets: Any = stored.get("slot_budgets")
    if not isinstance(budgets, list) or not all(type(budget) is int and budget >= 1 for budget in budgets):
        raise _other_evaluation(folder, "slot_budgets", budgets, given)
    return budgets


def _object_in(content: bytes, place: str) -> dict[str, Any]:
    """A JSON object; `place` is for errors."""
    try:
        plain = json.loads(content)
        if isinstance(plain, dict):
            return plain
        found: object = type(plain).__name__
    except (ValueError, RecursionError) as error:
        found = error
    raise ValueError(f"{place}: expected a JSON object, found {found}: remove the file, or choose another --output")


def _require_same(stored: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    for name in sorted(stored.keys() | given.keys()):
        if stored.get(name) != given.get(name):
            raise _other_evaluation(folder, name, stored.get(name), given.get(name))


def _other_evaluation(folder: Path, name: str, stored: object, given: object) -> ValueError:
    return ValueError(
        f"expected the evaluation with which {folder} was created, {name} {stored!r}, found {given!r}: choose another "
        "--output"
    )
