"""The report of a run: `report.json` for programs, `report.md` for docs/results, and printed tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from benchmarks.on_a_gpu.process import Outcome
from benchmarks.on_a_gpu.rows import Figure, Row
from ptp_lightning.utils.atomic_files import write_atomically

MAX_ROUNDED = 10_000  # smaller numbers are shown with three significant digits


@dataclass
class Report:
    """The content of a report.

    Attributes:
        date: of the start, in ISO format.
        commit: of the repository.
        command: the command line.
        parts: finished parts.
        seconds: since the start.
    """

    date: str
    commit: str
    command: str
    parts: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all parts passed."""
        return bool(self.parts) and all(part.passed for part in self.parts)

    def write(self, folder: Path) -> None:
        """Write both files atomically."""
        content = asdict(self) | {"passed": self.passed}
        texts = {"report.json": json.dumps(content, indent=2) + "\n", "report.md": self.as_markdown()}
        for name, text in texts.items():
            write_atomically(folder / name, text.encode())

    def as_markdown(self) -> str:
        """A section of a page in docs/results."""
        blocks = [f"## {self.date[:10]}: on a GPU (commit {self.commit})", f"`{self.command}`, {self.seconds:.0f} s"]
        for part in self.parts:
            blocks.append(f"### {part.name}")
            for head, *lines in tables(part.rows):
                table = [head, ["---"] * len(head), *lines]
                blocks.append("\n".join("| " + " | ".join(line) + " |" for line in table))
            blocks.append("\n".join(f"* **failed: {reason}**" for reason in reasons(part)))
        return "\n\n".join(block for block in blocks if block) + "\n"


def as_text(part: Outcome) -> str:
    """A part as tables with aligned columns, and its failures."""
    lines = [f"== {part.name}: {part.seconds:.0f} s of at most {part.limit_seconds:.0f} s"]
    labels = max((len(row.label) for row in part.rows), default=0)
    for table in tables(part.rows):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for label, *figures in table:
            aligned = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
            lines.append("  ".join([label.ljust(labels), *aligned]).rstrip())
    return "\n".join([*lines, *(f"failed: {reason}" for reason in reasons(part))]) + "\n"


def tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Tables of consecutive rows with the same figures, each with a header; failed rows are skipped."""
    found = []
    for names, group in groupby((row for row in rows if row.reason is None), lambda row: tuple(row.figures)):
        head = ["", *(name.replace("_", " ") for name in names)]
        found.append([head, *([row.label, *map(_format, row.figures.values())] for row in group)])
    return found


def reasons(part: Outcome) -> list[str]:
    """Messages of all failures in a part."""
    found = [f"{row.label}: {row.reason}" for row in part.rows if row.reason is not None]
    if part.reason is not None:
        found.append(f"{part.name}: {part.reason}")
    elif not part.rows:
        found.append(f"{part.name}: nothing was recorded")
    return found


def _format(figure: Figure) -> str:
    if figure is None:
        return ""
    if isinstance(figure, float):
        return f"{figure:,.0f}" if abs(figure) >= MAX_ROUNDED else f"{figure:#.3g}".rstrip(".")
    return str(figure)
