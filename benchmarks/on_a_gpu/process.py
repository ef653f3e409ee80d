"""Runs a part in its own process, so that a crash, a hang or a CUDA error does not affect other parts.

    python -m benchmarks.on_a_gpu.process MODULE:FUNCTION ARGUMENTS_JSON ROWS_FILE

calls the function with a recorder and the arguments. Each row is written to the file immediately.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.on_a_gpu.rows import Row, summarize

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # more host threads do not help while a GPU computes
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Args:
        name: in the report.
        function: `module:function`, called with a recorder of rows and with `arguments` by name.
        arguments: JSON data.
        weight: the remaining time is divided among the remaining parts in proportion to their weights.
        is_required: whether the run ends if this part fails.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]
    weight: float
    is_required: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    Attributes:
        name: of the part.
        rows: recorded.
        seconds: duration.
        limit_seconds: time limit.
        reason: why the process failed or was stopped; None if it succeeded.
    """

    name: str
    rows: list[Row]
    seconds: float
    limit_seconds: float
    reason: str | None

    @property
    def passed(self) -> bool:
        """Whether there are rows, and no failure."""
        return bool(self.rows) and self.reason is None and all(row.reason is None for row in self.rows)


def run_part(part: Part, limit_seconds: float, folder: Path) -> Outcome:
    """Run a part until it ends or exceeds its time limit.

    Args:
        part: to run.
        limit_seconds: after which the process and its children are killed.
        folder: of the rows, `NAME.rows.jsonl`, and of the output, `NAME.log`.
    """
    stem = part.name.replace(" ", "_")
    rows, log = folder / f"{stem}.rows.jsonl", folder / f"{stem}.log"
    rows.write_text("")
    command = [sys.executable, "-m", __name__, part.function, json.dumps(dict(part.arguments)), str(rows)]
    begin = monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be killed with it
        )
        try:
            status: int | None = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(part.name, _read(rows), monotonic() - begin, limit_seconds, _reason(status, limit_seconds, log))


def _read(file: Path) -> list[Row]:
    """All completely written rows."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def _reason(status: int | None, limit_seconds: float, log: Path) -> str | None:
    if status == 0:
        return None
    if status is None:
        return f"stopped after its {limit_seconds:.0f} s"
    output = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    status_text = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{status_text}: {output[-1].strip()}" if output else status_text


def main(function: str, arguments: str, file: str) -> None:
    """Entry point of the process."""
    with Path(file).open("a", encoding="utf-8") as rows:

        def record(row: Row) -> None:
            rows.write(json.dumps(asdict(row)) + "\n")
            rows.flush()
            print(row, flush=True)

        try:
            pkgutil.resolve_name(function)(record, **json.loads(arguments))
        except Exception as error:
            print(summarize(error), file=sys.stderr)  # after the traceback, so that it is the last line
            raise SystemExit(1) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
