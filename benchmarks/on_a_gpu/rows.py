"""Rows: what the parts of a run on a GPU find, one line of the report each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

Figure: TypeAlias = float | int | str | None
LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Args:
        label: what was measured.
        figures: by name, units in the names.
        reason: of a failure; None if there was none.
    """

    label: str
    figures: dict[str, Figure] = field(default_factory=dict)
    reason: str | None = None


Record: TypeAlias = Callable[[Row], None]


def attempt(record: Record, label: str, measure: Callable[[], dict[str, Figure]]) -> dict[str, Figure] | None:
    """Record what a measurement returns, or the reason why it raised, so that the next one has its turn.

    Returns:
        Its figures; None if it raised.
    """
    try:
        figures = measure()
    except Exception as error:
        record(Row(label, reason=in_short(error)))
        return None
    record(Row(label, figures))
    return figures


def in_short(error: BaseException) -> str:
    """Kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:LONGEST_REASON].removesuffix(": ")
