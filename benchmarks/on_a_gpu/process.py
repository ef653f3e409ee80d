"""A part of the run in a process of its own: it may crash, hang or poison its CUDA context, and the others go on.

    python -m benchmarks.on_a_gpu.process MODULE:FUNCTION ARGUMENTS_JSON ROWS_FILE

calls the function with a recorder and the arguments. A row is in the file as soon as it has been recorded.
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

from benchmarks.on_a_gpu.rows import Row, in_short

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # threads of the host only wait for each other while a GPU works
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Args:
        name: of it, in the report.
        function: `module:function`, which gets a recorder of rows first, then `arguments` by name.
        arguments: plain data.
        share: of the time that is left, in comparison with the parts that follow.
        is_required: whether none can follow if it fails.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]
    share: float
    is_required: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a part.

    Attributes:
        name: of the part.
        rows: as many as were recorded.
        seconds: that it took.
        limit_seconds: that it had.
        reason: why it ended early; None if it did not.
    """

    name: str
    rows: list[Row]
    seconds: float
    limit_seconds: float
    reason: str | None

    @property
    def passed(self) -> bool:
        """Whether it recorded something, and no failure."""
        return bool(self.rows) and self.reason is None and all(row.reason is None for row in self.rows)


def run_part(part: Part, limit_seconds: float, folder: Path) -> Outcome:
    """Run it until it ends or its time is over.

    Args:
        part: what to run.
        limit_seconds: after which the process and all that it has started are killed.
        folder: gets `NAME.rows.jsonl` and what the process prints, `NAME.log`.
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
            start_new_session=True,  # so that what it starts can be ended with it
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
    """Rows that were written whole."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def _reason(status: int | None, limit_seconds: float, log: Path) -> str | None:
    if status == 0:
        return None
    if status is None:
        return f"stopped after its {limit_seconds:.0f} s"
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}: {said[-1].strip()}" if said else how


def main(function: str, arguments: str, file: str) -> None:
    """What the process does."""
    with Path(file).open("a", encoding="utf-8") as rows:

        def record(row: Row) -> None:
            rows.write(json.dumps(asdict(row)) + "\n")
            rows.flush()
            print(row, flush=True)

        try:
            pkgutil.resolve_name(function)(record, **json.loads(arguments))
        except Exception as error:
            print(in_short(error), file=sys.stderr)  # behind the traceback, so that it is the last line
            raise SystemExit(1) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
