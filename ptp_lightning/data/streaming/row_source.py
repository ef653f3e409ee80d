"""Row sources: the documents of a stream, read one at a time.

A source yields unparsed `RawRow`s, which are cheap, because every worker reads all rows and processes only its own.
Each row carries the position after it, from which `rows` resumes. A new source is one class with `rows` and `parse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ptp_lightning.data.shard_spec import ShardSpec

Position = dict[str, Any]
"""The read position of a source, as plain data for a checkpoint."""


class RawRow(NamedTuple):
    """One unparsed document.

    Attributes:
        content: input of `RowSource.parse`.
        name: its location (file and line), for messages.
        identity: equal for equal documents; its hash determines the split.
        position: after the row.
    """

    content: Any
    name: str
    identity: bytes
    position: Position


class RowSource(ABC):
    """A source of rows, whose order is determined by the key of the epoch."""

    @abstractmethod
    def rows(self, key: str, shard: ShardSpec, position: Position | None = None) -> Iterator[RawRow]:
        """Read one epoch.

        Args:
            key: seed of the order; different for each epoch.
            shard: which rows to yield.
            position: of a row of an earlier iteration with the same arguments; reading resumes after that row.

        Raises:
            FileNotFoundError: there is nothing to read.
        """

    @abstractmethod
    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """Columns by name.

        Raises:
            BadRowError: the row is invalid; the message contains its location and the reason.
        """


class BadRowError(ValueError):
    """An invalid row. The stream raises it or skips the row, see `StreamingCorpus.on_error`."""
