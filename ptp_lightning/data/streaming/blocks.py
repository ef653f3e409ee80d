"""Blocks: the unit of work of a stream. Some hundred documents are read, shuffled, tokenised and packed together.

A block depends only on the settings of the stream and on the position at which it starts. To resume, a block is read
again, so checkpoints contain no shuffle buffer. Workers process blocks in parallel without an effect on the order: each
worker reads all rows, which is cheap, and processes only its own blocks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ptp_lightning.data.corpus import Split, split_of
from ptp_lightning.data.packing import MIN_PIECE_TOKENS, PackedRow, TokenDocument, pack
from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.mixture import MixedRow, Mixture, StreamPart
from ptp_lightning.data.streaming.row_source import BadRowError, Position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BLOCK_BYTES = 1_000_000  # of documents, about 250,000 tokens; a block that is larger ends early

SplitRule = Literal["none", "hash", "halves"]
"""How documents are assigned to splits: not at all, by a hash in the ratio 90/5/5, or half validation and half test."""


class BlockSettings(NamedTuple):
    """Settings of blocks.

    Attributes:
        tokenizer: of the model.
        row_length: S, tokens per row.
        num_documents: number of source rows in a block; fewer if they are long.
        seed: of the order within a block.
        split_rule: how documents are assigned to splits.
    """

    tokenizer: PreTrainedTokenizerBase
    row_length: int
    num_documents: int
    seed: int
    split_rule: SplitRule


class Block(NamedTuple):
    """A processed block.

    Attributes:
        number: in the stream.
        position: of the source before the block; None at the start of the stream.
        rows: packed rows, `[R, S]` each.
        num_documents: number of documents in the rows.
        num_split: how many of them are longer than a row and were split.
        num_too_short: number of skipped documents of fewer than two tokens.
        num_not_learned: number of documents from which nothing is learned, such as a chat without an answer.
        row_errors: messages about skipped invalid rows.
    """

    number: int
    position: Position | None
    rows: PackedRow
    num_documents: int
    num_split: int
    num_too_short: int
    num_not_learned: int
    row_errors: list[str]


class BlockDocuments(NamedTuple):
    """The documents of a block before packing.

    Attributes:
        documents: of the split, shuffled.
        row_errors: messages about skipped invalid rows.
    """

    documents: list[TokenDocument]
    row_errors: list[str]


class BlockStream(IterableDataset[Block]):
    """Endless blocks of one split, starting at a position. Each of n data loader workers processes every n-th block.

    Args:
        parts: components of the mixture.
        shard: of this process.
        settings: of the blocks.
        split: whose documents are packed.
        number: of the first block.
        position: at which the first block starts.
        single_epoch: end when every component has been read once, and skip rows that a component repeats until then.
    """

    def __init__(
        self,
        parts: Sequence[StreamPart],
        shard: ShardSpec,
        settings: BlockSettings,
        split: Split = "train",
        number: int = 0,
        position: Position | None = None,
        single_epoch: bool = False,
    ) -> None:
        self._parts = list(parts)
        self._shard = shard
        self._settings = settings
        self._split: Split = split
        self._number = number
        self._position = position
        self._single_epoch = single_epoch

    def __iter__(self) -> Iterator[Block]:
        """Blocks in order; in a worker, only its own blocks."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        position = self._position
        for number, source_rows in enumerate(self._source_rows(), start=self._number):
            if (number - self._number) % num_workers == worker:
                yield self._block(number, position, source_rows)
            position = source_rows[-1].position

    def documents(self) -> Iterator[BlockDocuments]:
        """The documents of all blocks, in any worker."""
        for number, source_rows in enumerate(self._source_rows(), start=self._number):
            yield self._documents(self._order_of(number), source_rows)

    def _source_rows(self) -> Iterator[list[MixedRow]]:
        """The source rows of each block. With a single component, a block ends at the end of an epoch."""
        source_rows: list[MixedRow] = []
        num_bytes = 0
        for row in Mixture(self._parts, self._shard, self._settings.seed).rows(self._position):
            epochs = [part["epoch"] for part in row.position["parts"]]
            last = source_rows[-1].position["parts"] if source_rows else row.position["parts"]
            is_new_epoch = len(epochs) == 1 and last[0]["epoch"] != epochs[0]
            if len(source_rows) == self._settings.num_documents or num_bytes > MAX_BLOCK_BYTES or is_new_epoch:
                yield source_rows
                source_rows, num_bytes = [], 0
            if self._single_epoch and min(epochs) > 0:
                break
            if not (self._single_epoch and epochs[row.part] > 0):
                source_rows.append(row)
                num_bytes += len(row.row.identity)
        if source_rows:
            yield source_rows

    def _block(self, number: int, position: Position | None, source_rows: list[MixedRow]) -> Block:
        row_length, order = self._settings.row_length, self._order_of(number)
        documents, row_errors = self._documents(order, source_rows)
        long_enough = [document for document in documents if len(document) >= MIN_PIECE_TOKENS]
        # A row in which no window can start, for example within a long prompt, contains nothing to learn.
        rows = [row for row in pack(long_enough, row_length) if bool(row.eligible.any())]
        order.shuffle(rows)  # otherwise the rows of a long document would fill consecutive batches
        return Block(
            number,
            position,
            _stack(rows, row_length),
            num_documents=len(long_enough),
            num_split=sum(len(document) > row_length for document in long_enough),
            num_too_short=len(documents) - len(long_enough),
            num_not_learned=sum(not document.is_learned for document in long_enough),
            row_errors=row_errors,
        )

    def _order_of(self, number: int) -> random.Random:
        return random.Random(f"block/{self._settings.seed}/{self._shard.rank}/{number}")

    def _documents(self, order: random.Random, source_rows: list[MixedRow]) -> BlockDocuments:
        documents: list[TokenDocument] = []
        row_errors: list[str] = []
        for part, row, _ in order.sample(source_rows, len(source_rows)):
            if not self._is_in_split(row.identity):
                continue
            try:
                columns = self._parts[part].source.parse(row)
                documents += self._parts[part].effective_rendering.documents(columns, self._settings.tokenizer)
            except BadRowError as error:
                row_errors.append(str(error) if row.name in str(error) else f"{row.name}: {error}")
        return BlockDocuments(documents, row_errors)

    def _is_in_split(self, identity: bytes) -> bool:
        """Whether a document belongs to the split."""
        if self._settings.split_rule == "hash":
            return split_of(identity.hex()) == self._split
        if self._settings.split_rule == "halves":
            return (hashlib.sha256(identity).digest()[0] % 2 == 0) == (self._split == "val")
        return True


def _stack(rows: Sequence[PackedRow], row_length: int) -> PackedRow:
    if rows:
        return PackedRow(*(torch.stack(tensors) for tensors in zip(*rows, strict=True)))
    empty = torch.zeros(0, row_length, dtype=torch.long)
    return PackedRow(empty, empty, empty, empty.bool())
