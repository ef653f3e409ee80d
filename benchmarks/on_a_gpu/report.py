"""The report of a run: `report.json` for programs, `report.md` to be pasted into RESULTS.md, and a table to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from benchmarks.on_a_gpu.process import Outcome
from benchmarks.on_a_gpu.rows import Figure, Row

SMALL_ENOUGH = 10_000  # for numbers with three digits that count


@dataclass
class Report:
    """All of it, so far.

    Attributes:
        date: of the start, ISO.
        commit: of the repository.
        command: that was typed.
        parts: that have ended.
        seconds: so far.
    """

    date: str
    commit: str
    command: str
    parts: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every part did."""
        return bool(self.parts) and all(part.passed for part in self.parts)

    def write(self, folder: Path) -> None:
        """Write both files, each at once: whoever reads, or stops the run, never meets half of one."""
        content = asdict(self) | {"passed": self.passed}
        texts = {"report.json": json.dumps(content, indent=2) + "\n", "report.md": self.as_markdown()}
        for name, text in texts.items():
            unfinished = folder / f"{name}.part"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(folder / name)

    def as_markdown(self) -> str:
        """A section of RESULTS.md."""
        blocks = [f"## {self.date[:10]}: on a GPU (commit {self.commit})", f"`{self.command}`, {self.seconds:.0f} s"]
        for part in self.parts:
            blocks.append(f"### {part.name}")
            for head, *lines in tables(part.rows):
                table = [head, ["---"] * len(head), *lines]
                blocks.append("\n".join("| " + " | ".join(line) + " |" for line in table))
            blocks.append("\n".join(f"* **failed: {reason}**" for reason in reasons(part)))
        return "\n\n".join(block for block in blocks if block) + "\n"


def as_text(part: Outcome) -> str:
    """A part as tables of aligned columns, and what went wrong."""
    said = [f"== {part.name}: {part.seconds:.0f} s of at most {part.limit_seconds:.0f} s"]
    labels = max((len(row.label) for row in part.rows), default=0)
    for table in tables(part.rows):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for label, *figures in table:
            aligned = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
            said.append("  ".join([label.ljust(labels), *aligned]).rstrip())
    return "\n".join([*said, *(f"failed: {reason}" for reason in reasons(part))]) + "\n"


def tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Rows that follow each other with the same figures, with these names above them; failures are not among them."""
    found = []
    for names, alike in groupby((row for row in rows if row.reason is None), lambda row: tuple(row.figures)):
        head = ["", *(name.replace("_", " ") for name in names)]
        found.append([head, *([row.label, *map(_shown, row.figures.values())] for row in alike)])
    return found


def reasons(part: Outcome) -> list[str]:
    """Of all failures in a part."""
    found = [f"{row.label}: {row.reason}" for row in part.rows if row.reason is not None]
    if part.reason is not None:
        found.append(f"{part.name}: {part.reason}")
    elif not part.rows:
        found.append(f"{part.name}: nothing was recorded")
    return found


def _shown(figure: Figure) -> str:
    if figure is None:
        return ""
    if isinstance(figure, float):
        return f"{figure:,.0f}" if abs(figure) >= SMALL_ENOUGH else f"{figure:#.3g}".rstrip(".")
    return str(figure)
