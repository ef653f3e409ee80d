"""Everything that needs a GPU, in one command of less than ten minutes, without a network.

    python -m benchmarks.on_a_gpu --output runs/on_a_gpu
    python -m benchmarks.on_a_gpu --output runs/on_a_gpu --device cpu      the same parts, tiny, in a minute

Runs the tests marked `gpu`, steps of training with windows by blocks and with one dense mask, and decoding against
`transformers.generate`, with CUDA graphs for both. Each part has a process and a share of the time: if it crashes or
takes too long, the report says so and the next one has its turn. `report.json` and `report.md` are written anew after
each part, tables are printed as they come, and the exit status is 0 if nothing failed.
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

MINUTES = 9.5  # with what Python needs to end, less than ten
SECONDS_PER_MINUTE = 60


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_a_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the reports and of what parts print")
    parser.add_argument("--device", choices=list(PARTS), default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which the last part is stopped")
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    return run(PARTS[options.device], options.output, options.minutes, shlex.join([*parser.prog.split(), *words]))


def run(parts: Sequence[Part], folder: Path, minutes: float, command: str) -> int:
    """Run the parts one after the other; what one leaves of its time is shared among those that follow.

    Args:
        parts: what to run.
        folder: gets the reports.
        minutes: for all.
        command: that was typed.

    Returns:
        0 if nothing failed, else 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = monotonic()
    report = Report(datetime.now().astimezone().isoformat(timespec="seconds"), commit(), command)
    for number, part in enumerate(parts):
        left = max(0.0, minutes * SECONDS_PER_MINUTE - (monotonic() - begin))
        limit = left * part.share / sum(one.share for one in parts[number:])
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
    """Of the repository, and whether files differ from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
