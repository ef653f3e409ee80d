"""Markdown tables and the numbers in them."""

from __future__ import annotations

import math

NONE = "-"


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is the header.

    >>> print(markdown([["a", "b"], ["1", "2"]]), end="")
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    header, *others = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *others])


def number(value: float, digits: int = 3) -> str:
    """A number for a table; `-` for NaN.

    >>> number(0.12345), number(float("nan"))
    ('0.123', '-')
    """
    return NONE if math.isnan(value) else f"{value:.{digits}f}"
