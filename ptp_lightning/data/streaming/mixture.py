"""Mixtures: several sources of rows as one endless stream that can stop and go on at any row."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ptp_lightning.data.rendering import PlainText, Rendering
from ptp_lightning.data.streaming.row_source import Position, RawRow, RowSource, Share


@dataclass(frozen=True)
class StreamPart:
    """One source of a stream.

    Args:
        source: of rows.
        rendering: how a row becomes tokens; by default `PlainText`. (An instance as the default would lend its
            arguments to the class that YAML names in its place.)
        weight: share of the stream's documents against the other parts' weights.

    Raises:
        ValueError: the weight is not positive and finite.
    """

    source: RowSource
    rendering: Rendering | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a weight that draws nothing."""
        if not 0 < self.weight < math.inf:
            raise ValueError(f"expected a finite weight > 0 in data.parts, found {self.weight}")

    @property
    def renders(self) -> Rendering:
        """The rendering that acts."""
        return PlainText() if self.rendering is None else self.rendering


class MixedRow(NamedTuple):
    """A row of a mixture.

    Attributes:
        part: the number of its part.
        row: itself.
        position: of the mixture behind it.
    """

    part: int
    row: RawRow
    position: Position


class Mixture:
    """Rows of all parts, for ever. Each part goes through its own epochs: every row once, then all once more.

    Which part the next row comes from is drawn by weight, from the number of the row alone.

    Args:
        parts: of the stream.
        share: the rows that are wanted.
        seed: of the order.
    """

    def __init__(self, parts: Sequence[StreamPart], share: Share, seed: int) -> None:
        self._parts = list(parts)
        self._share = share
        self._seed = seed

    def rows(self, position: Position | None = None) -> Iterator[MixedRow]:
        """All rows behind a position.

        Raises:
            ValueError: a part has no row at all; names it.
            FileNotFoundError: a part cannot be opened.
        """
        if position is None:
            position = {"number": 0, "parts": [{"epoch": 0, "within": None} for _ in self._parts]}
        states = list(position["parts"])
        opened: list[Iterator[RawRow] | None] = [None] * len(states)
        number = position["number"]
        while True:
            part = self._drawn(number)
            row, states[part], opened[part] = self._next(part, states[part], opened[part])
            number += 1
            yield MixedRow(part, row, {"number": number, "parts": list(states)})

    def _drawn(self, number: int) -> int:
        if len(self._parts) == 1:
            return 0
        weights = [part.weight for part in self._parts]
        return random.Random(f"mixture/{self._seed}/{number}").choices(range(len(weights)), weights)[0]

    def _next(
        self, part: int, state: dict[str, Any], opened: Iterator[RawRow] | None
    ) -> tuple[RawRow, dict[str, Any], Iterator[RawRow]]:
        """The next row of a part, the part's state behind it, and the iterator that goes on there."""
        fresh = opened is None and state["within"] is None
        rows = self._open(part, state) if opened is None else opened
        row = next(rows, None)
        if row is None and not fresh:  # the end of an epoch
            state = {"epoch": state["epoch"] + 1, "within": None}
            rows = self._open(part, state)
            row = next(rows, None)
        if row is None:
            raise ValueError(
                f"expected documents in {self._parts[part].source}, found none for process {self._share.rank} of "
                f"{self._share.world}: set part {part} of data.parts"
            )
        return row, {"epoch": state["epoch"], "within": row.position}, rows

    def _open(self, part: int, state: dict[str, Any]) -> Iterator[RawRow]:
        key = f"{self._seed}/{part}/{state['epoch']}"
        return self._parts[part].source.rows(key, self._share, state["within"])
