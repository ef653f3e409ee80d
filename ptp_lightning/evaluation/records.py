"""Records: what each run of an evaluation gave, one JSON line a run, so that a killed evaluation goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

RUN_FILE, RECORDS_FILE = "run.json", "records.jsonl"


class RunKey(NamedTuple):
    """Which run it is: what is asked, how tokens are sampled, and who answers."""

    question_id: str
    turn: int
    seed: int
    temperature: float
    contender: str


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        question_id: of the question.
        category: of the question.
        turn: 0 for the first.
        seed: of the auxiliaries.
        temperature: of the sampling.
        contender: who answered.
        num_prompt_tokens: that were read.
        num_cut: tokens left out at the prompt's beginning, for lack of room.
        token_ids: the answer.
        num_calls: forward passes.
        seconds: wall-clock time.
        phases: seconds of each phase; empty for libraries, which do not tell.
        peak_bytes: most memory in use, of the GPU where there is one, else resident.
        correct_per_cycle: see `Decoded`.
        drafted_per_cycle: see `Decoded`.
    """

    question_id: str
    category: str
    turn: int
    seed: int
    temperature: float
    contender: str
    num_prompt_tokens: int
    num_cut: int
    token_ids: list[int]
    num_calls: int
    seconds: float
    phases: dict[str, float]
    peak_bytes: int
    correct_per_cycle: list[int]
    drafted_per_cycle: list[int]

    @property
    def key(self) -> RunKey:
        """See `RunKey`."""
        return RunKey(self.question_id, self.turn, self.seed, self.temperature, self.contender)


class RecordFile:
    """The records of a folder; finished runs are found again when the evaluation starts anew.

    Args:
        folder: is made if it is not there.
        run: what was asked for; a folder of another run is refused.

    Attributes:
        records: of all finished runs.

    Raises:
        ValueError: the folder holds records of another run, or a file that is none of them.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORDS_FILE
        stored = folder / RUN_FILE
        if stored.is_file():
            _require_same(json.loads(stored.read_text(encoding="utf-8")), json.loads(json.dumps(run)), folder)
        elif self._path.is_file():
            raise ValueError(f"expected {stored} beside {self._path}, found none: choose another --output")
        else:
            stored.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        self.records = {record.key: record for record in self._read()}

    def append(self, record: Record) -> None:
        """Write a finished run at once."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self.records[record.key] = record

    def _read(self) -> Iterator[Record]:
        if not self._path.is_file():
            return
        text = self._path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):  # killed while writing: that run has to be done again
            with self._path.open("r+b") as file:
                file.truncate(whole)
        names = {field.name for field in fields(Record)}
        for number, line in enumerate(text[:whole].splitlines(), start=1):
            row = json.loads(line)
            if row.keys() != names:
                raise ValueError(f"{self._path}, line {number}: expected a record, found {sorted(row)}")
            yield Record(**row)


def _require_same(stored: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    for name in sorted(stored.keys() | asked.keys()):
        if stored.get(name) != asked.get(name):
            raise ValueError(
                f"expected the evaluation that {folder} was begun with, {name} {stored.get(name)!r}, found "
                f"{asked.get(name)!r}: choose another --output"
            )
