"""Rows: measurements of the parts of a run, one line of the report each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

Figure: TypeAlias = float | int | str | None
MAX_REASON_LENGTH = 300  # characters


@dataclass(frozen=True)
class Row:
    """A measurement, or the reason of its failure.

    Args:
        label: what was measured.
        figures: by name; names contain units.
        reason: of a failure, or None.
    """

    label: str
    figures: dict[str, Figure] = field(default_factory=dict)
    reason: str | None = None


Record: TypeAlias = Callable[[Row], None]


def attempt(record: Record, label: str, measure: Callable[[], dict[str, Figure]]) -> dict[str, Figure] | None:
    """Record the result of a measurement, or the error that it raises.

    Returns:
        The figures; None if it raised an error.
    """
    try:
        figures = measure()
    except Exception as error:
        record(Row(label, reason=summarize(error)))
        return None
    record(Row(label, figures))
    return figures


def summarize(error: BaseException) -> str:
    """Type of an error and the first line of its message.

    >>> summarize(ValueError("wrong\\nmore"))
    'ValueError: wrong'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:MAX_REASON_LENGTH].removesuffix(": ")
