"""Row sources: where the documents of a stream come from, read one after another and never all at once.

A source yields `RawRow`s that are cheap to make and to throw away, because every worker reads all rows and works on its
own share. Each carries the position behind it, from which `rows` goes on exactly. A new source is one class with `rows`
and `parse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Position = dict[str, Any]
"""Where a source stands, as plain data that a checkpoint can hold."""


class RawRow(NamedTuple):
    """One document, not looked into.

    Attributes:
        content: for `RowSource.parse`.
        name: where it stands, for messages.
        identity: equal for equal documents; decides the split.
        position: behind it.
    """

    content: Any
    name: str
    identity: bytes
    position: Position


@dataclass(frozen=True)
class Share:
    """Which rows of a source a process takes: those whose number is `rank` modulo `world`."""

    rank: int = 0
    world: int = 1


class RowSource(ABC):
    """Rows in an order that is a function of the epoch's key alone."""

    @abstractmethod
    def rows(self, key: str, share: Share, position: Position | None = None) -> Iterator[RawRow]:
        """Read an epoch.

        Args:
            key: of the order; another epoch has another one.
            share: the rows that are wanted.
            position: of a row of an earlier iteration with the same arguments, to go on behind it.

        Raises:
            FileNotFoundError: there is nothing to read.
        """

    @abstractmethod
    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """Columns by name.

        Raises:
            BadRowError: the row is broken; says where it stands and what is wrong.
        """


class BadRowError(ValueError):
    """A row that cannot be used; whether that ends the run is the stream's decision."""
