"""All checks that need a GPU in one command, in less than ten minutes and without a network.

    python -m benchmarks.on_a_gpu --output runs/on_a_gpu
    python -m benchmarks.on_a_gpu --output runs/on_a_gpu --device cpu      the same parts with tiny models, in a minute

Runs the tests marked `gpu`, training steps with block attention and with dense attention, and decoding compared with
`transformers.generate`, with and without CUDA graphs. Each part runs in its own process with a time limit. If it
crashes or exceeds the limit, the report says so, and the next part runs. `report.json` and `report.md` are updated
after each part, tables are printed, and the exit status is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic

from benchmarks.on_a_gpu.parts import PARTS
from benchmarks.on_a_gpu.process import ROOT, Part, run_part
from benchmarks.on_a_gpu.report import Report, as_text

MINUTES = 9.5  # less than ten with the start and end of Python
SECONDS_PER_MINUTE = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_a_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the reports and of the output of parts")
    parser.add_argument("--device", choices=list(PARTS), default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit of all parts")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    return run(PARTS[options.device], options.output, options.minutes, shlex.join([*parser.prog.split(), *arguments]))


def run(parts: Sequence[Part], folder: Path, minutes: float, command: str) -> int:
    """Run the parts one after another; unused time of a part is divided among the following parts.

    Args:
        parts: to run.
        folder: of the reports.
        minutes: time limit of all parts.
        command: the command line, for the report.

    Returns:
        0 if nothing failed, else 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = monotonic()
    report = Report(datetime.now().astimezone().isoformat(timespec="seconds"), commit(), command)
    for number, part in enumerate(parts):
        remaining = max(0.0, minutes * SECONDS_PER_MINUTE - (monotonic() - begin))
        limit = remaining * part.weight / sum(other.weight for other in parts[number:])
        report.parts.append(run_part(part, limit, folder))
        report.seconds = monotonic() - begin
        report.write(folder)
        print(as_text(report.parts[-1]), flush=True)
        if part.is_required and not report.passed:
            break
    failed = [part.name for part in report.parts if not part.passed]
    print(f"{report.seconds:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'all passed'}; {folder}/report.md")
    return 0 if report.passed else 1


def commit() -> str:
    """The commit of the repository, marked as dirty if files differ from it."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
