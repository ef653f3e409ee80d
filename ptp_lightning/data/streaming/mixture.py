"""Mixtures: several row sources as one endless stream that can be resumed at any row."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ptp_lightning.data.rendering import PlainText, Rendering
from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.row_source import Position, RawRow, RowSource


@dataclass(frozen=True)
class StreamPart:
    """One component of a mixture.

    Args:
        source: of rows.
        rendering: turns a row into tokens; by default `PlainText`. (The default is None, because jsonargparse would
            pass the arguments of a default instance to the class that a configuration names.)
        weight: sampling weight of the component, relative to the weights of the others.

    Raises:
        ValueError: the weight is not positive and finite.
    """

    source: RowSource
    rendering: Rendering | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0 < self.weight < math.inf:
            raise ValueError(f"expected a finite weight > 0 in data.parts, found {self.weight}")

    @property
    def effective_rendering(self) -> Rendering:
        """`rendering`, or the default."""
        return PlainText() if self.rendering is None else self.rendering


class MixedRow(NamedTuple):
    """A row of a mixture.

    Attributes:
        part: index of its component.
        row: of the component's source.
        position: of the mixture after the row.
    """

    part: int
    row: RawRow
    position: Position


class Mixture:
    """Endless rows of all components. Each component has its own epochs, in which it yields every row once.

    The component of a row is drawn by weight; the draw depends on the seed and the number of the row alone.

    Args:
        parts: the components.
        shard: which rows to yield.
        seed: of the order.
    """

    def __init__(self, parts: Sequence[StreamPart], shard: ShardSpec, seed: int) -> None:
        self._parts = list(parts)
        self._shard = shard
        self._seed = seed

    def rows(self, position: Position | None = None) -> Iterator[MixedRow]:
        """All rows after a position.

        Raises:
            ValueError: a component has no rows; the message names it.
            FileNotFoundError: a component cannot be opened.
        """
        if position is None:
            position = {"number": 0, "parts": [{"epoch": 0, "within": None} for _ in self._parts]}
        states = list(position["parts"])
        opened: list[Iterator[RawRow] | None] = [None] * len(states)
        number = position["number"]
        while True:
            part = self._draw_part(number)
            row, states[part], opened[part] = self._next(part, states[part], opened[part])
            number += 1
            yield MixedRow(part, row, {"number": number, "parts": list(states)})

    def _draw_part(self, number: int) -> int:
        if len(self._parts) == 1:
            return 0
        weights = [part.weight for part in self._parts]
        return random.Random(f"mixture/{self._seed}/{number}").choices(range(len(weights)), weights)[0]

    def _next(
        self, part: int, state: dict[str, Any], opened: Iterator[RawRow] | None
    ) -> tuple[RawRow, dict[str, Any], Iterator[RawRow]]:
        """The next row of a component, the component's state after it, and the iterator to continue with."""
        is_new_epoch = opened is None and state["within"] is None
        rows = self._open(part, state) if opened is None else opened
        row = next(rows, None)
        if row is None and not is_new_epoch:  # the end of an epoch
            state = {"epoch": state["epoch"] + 1, "within": None}
            rows = self._open(part, state)
            row = next(rows, None)
        if row is None:
            raise ValueError(
                f"expected documents in {self._parts[part].source}, found none for rank {self._shard.rank} of "
                f"{self._shard.world_size}: set part {part} of data.parts"
            )
        return row, {"epoch": state["epoch"], "within": row.position}, rows

    def _open(self, part: int, state: dict[str, Any]) -> Iterator[RawRow]:
        key = f"{self._seed}/{part}/{state['epoch']}"
        return self._parts[part].source.rows(key, self._shard, state["within"])
