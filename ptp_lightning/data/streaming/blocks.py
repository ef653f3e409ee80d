"""Blocks: the unit of work of a stream. Some hundred documents are read, shuffled, tokenised and packed together.

A block is a function of the stream's settings and the position it begins at. So nothing of a shuffle buffer has to be
kept to go on exactly: the block is read once more. And workers can make blocks in parallel without any effect on the
order: each reads all rows, which is cheap, and works on its own blocks alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ptp_lightning.data.corpus import Split, split_of
from ptp_lightning.data.packing import MIN_PIECE, PackedRow, TokenDocument, pack
from ptp_lightning.data.streaming.mixture import MixedRow, Mixture, StreamPart
from ptp_lightning.data.streaming.row_source import BadRowError, Position, Share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_BLOCK_BYTES = 1_000_000  # of documents, after which a block ends early: a quarter of a million tokens

Division = Literal["none", "hash", "halves"]
"""How documents are divided among splits: not at all, by a hash (90, 5 and 5 of 100), or into validation and test."""


class BlockSettings(NamedTuple):
    """What makes a block of the rows it reads.

    Attributes:
        tokenizer: turns text into ids.
        row_length: S, tokens per row.
        num_documents: rows of the sources that a block reads; fewer if they are long.
        seed: of the order inside a block.
        division: of the documents among splits.
    """

    tokenizer: PreTrainedTokenizerBase
    row_length: int
    num_documents: int
    seed: int
    division: Division


class Block(NamedTuple):
    """A finished block.

    Attributes:
        number: in the stream.
        position: where it began.
        rows: packed, `[R, S]` each.
        num_documents: that went into it.
        num_long: how many of them did not fit into one row and were cut.
        num_short: documents of fewer than two tokens, which were left out.
        complaints: about rows that could not be used, and were left out.
    """

    number: int
    position: Position | None
    rows: PackedRow
    num_documents: int
    num_long: int
    num_short: int
    complaints: list[str]


class BlockDocuments(NamedTuple):
    """What the rows of a block hold.

    Attributes:
        documents: of the split, shuffled.
        complaints: about rows that could not be used, and were left out.
    """

    documents: list[TokenDocument]
    complaints: list[str]


class BlockStream(IterableDataset[Block]):
    """Endless blocks of one split, from a position on; the workers of a data loader make every n-th each.

    Args:
        parts: of the mixture.
        share: of this process.
        settings: of blocks.
        split: whose documents are packed.
        number: of the first block.
        position: where it begins.
        once: end when every part was read to its end, and leave out what parts repeat until then.
    """

    def __init__(
        self,
        parts: Sequence[StreamPart],
        share: Share,
        settings: BlockSettings,
        split: Split = "train",
        number: int = 0,
        position: Position | None = None,
        once: bool = False,
    ) -> None:
        self._parts = list(parts)
        self._share = share
        self._settings = settings
        self._split: Split = split
        self._number = number
        self._position = position
        self._once = once

    def __iter__(self) -> Iterator[Block]:
        """Blocks in order; in a worker, its own ones."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        position = self._position
        for number, members in enumerate(self._members(), start=self._number):
            if (number - self._number) % num_workers == worker:
                yield self._block(number, position, members)
            position = members[-1].position

    def documents(self) -> Iterator[BlockDocuments]:
        """What all blocks hold before they are packed, whatever process this is."""
        for number, members in enumerate(self._members(), start=self._number):
            yield self._documents(self._order_of(number), members)

    def _members(self) -> Iterator[list[MixedRow]]:
        """The rows of each block. Where there is one part alone, blocks end with its epochs."""
        members: list[MixedRow] = []
        num_bytes = 0
        for row in Mixture(self._parts, self._share, self._settings.seed).rows(self._position):
            epochs = [part["epoch"] for part in row.position["parts"]]
            is_new_epoch = len(epochs) == 1 and members and members[-1].position["parts"][0]["epoch"] != epochs[0]
            if len(members) == self._settings.num_documents or num_bytes > LARGEST_BLOCK_BYTES or is_new_epoch:
                yield members
                members, num_bytes = [], 0
            if self._once and min(epochs) > 0:
                break
            if not (self._once and epochs[row.part] > 0):
                members.append(row)
                num_bytes += len(row.row.identity)
        if members:
            yield members

    def _block(self, number: int, position: Position | None, members: list[MixedRow]) -> Block:
        row_length, order = self._settings.row_length, self._order_of(number)
        documents, complaints = self._documents(order, members)
        long_enough = [document for document in documents if len(document) >= MIN_PIECE]
        # A row without a place where a window may start, such as a long prompt's, has nothing to be learned.
        rows = [row for row in pack(long_enough, row_length) if bool(row.eligible.any())]
        order.shuffle(rows)  # or a long document would fill one batch after another
        return Block(
            number,
            position,
            _stacked(rows, row_length),
            num_documents=len(long_enough),
            num_long=sum(len(document) > row_length for document in long_enough),
            num_short=len(documents) - len(long_enough),
            complaints=complaints,
        )

    def _order_of(self, number: int) -> random.Random:
        return random.Random(f"block/{self._settings.seed}/{self._share.rank}/{number}")

    def _documents(self, order: random.Random, members: list[MixedRow]) -> BlockDocuments:
        documents: list[TokenDocument] = []
        complaints: list[str] = []
        for part, row, _ in order.sample(members, len(members)):
            if not self._belongs(row.identity):
                continue
            try:
                columns = self._parts[part].source.parse(row)
                documents.append(self._parts[part].renders.document(columns, self._settings.tokenizer))
            except BadRowError as error:
                complaints.append(str(error) if row.name in str(error) else f"{row.name}: {error}")
        return BlockDocuments(documents, complaints)

    def _belongs(self, identity: bytes) -> bool:
        """Whether a document is one of the split's."""
        if self._settings.division == "hash":
            return split_of(identity.hex()) == self._split
        if self._settings.division == "halves":
            return (hashlib.sha256(identity).digest()[0] % 2 == 0) == (self._split == "val")
        return True


def _stacked(rows: Sequence[PackedRow], row_length: int) -> PackedRow:
    if rows:
        return PackedRow(*(torch.stack(tensors) for tensors in zip(*rows, strict=True)))
    empty = torch.zeros(0, row_length, dtype=torch.long)
    return PackedRow(empty, empty, empty, empty.bool())
