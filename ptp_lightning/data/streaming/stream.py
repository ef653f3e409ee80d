"""DocumentStream: an endless stream of packed batches of documents, which can start at any batch."""

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NotRequired, TypedDict, TypeVar, Unpack

import torch
from torch.utils.data import IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packing import PackedRow, collate
from ptp_lightning.utils.randomness import keyed_generator

DocumentT = TypeVar("DocumentT")


def empty_split_error(split: Split, num_documents: int) -> ValueError:
    """The error for a split without a document of two or more tokens."""
    return ValueError(
        f"expected a document of two or more tokens in the {split} split, found none among {num_documents} documents "
        "of this process: set data.corpus (every process needs at least one such document)"
    )


class StreamSettings(TypedDict):
    """The settings of a stream.

    Attributes:
        batch_size: B, rows per batch.
        num_windows: N, windows per row.
        shuffle_rows: size of the shuffle buffer, in rows.
        seed: of the order of documents and rows, and of the window positions.
        skip_batches: number of batches to skip, by default 0; a function is called at the start of each iteration.
    """

    batch_size: int
    num_windows: int
    shuffle_rows: int
    seed: int
    skip_batches: NotRequired[int | Callable[[], int]]


class DocumentStream(IterableDataset[PackedBatch], ABC, Generic[DocumentT]):
    """An endless stream of packed batches over shuffled epochs of the documents.

    Batch k depends only on the documents, the settings and k. A stream with `skip_batches = k` continues a stream that
    was stopped after k batches.

    Args:
        documents: the training documents of this rank, in the form that `pack_documents` accepts.
        **settings: see `StreamSettings`.
    """

    def __init__(self, documents: Sequence[DocumentT], **settings: Unpack[StreamSettings]) -> None:
        self.documents = documents
        self.batch_size = settings["batch_size"]
        self.num_windows = settings["num_windows"]
        self.shuffle_rows = settings["shuffle_rows"]
        self.seed = settings["seed"]
        self.skip_batches = settings.get("skip_batches", 0)

    @abstractmethod
    def pack_documents(self, documents: Sequence[DocumentT]) -> Iterator[PackedRow]:
        """Packed rows of these documents, in this order."""

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield endless batches, starting with number `skip_batches`.

        Raises:
            ValueError: no document has two or more tokens.
        """
        rows = self._shuffled_rows()
        skip_batches = self.skip_batches if isinstance(self.skip_batches, int) else self.skip_batches()
        for _ in range(skip_batches * self.batch_size):
            next(rows)
        for batch_index in itertools.count(skip_batches):
            generator = keyed_generator(self.seed, "windows", batch_index)
            yield collate([next(rows) for _ in range(self.batch_size)], self.num_windows, generator)

    def _rows(self) -> Iterator[PackedRow]:
        """Rows of all epochs; each epoch has a different order."""
        for epoch in itertools.count():
            order = list(self.documents)
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            rows = self.pack_documents(order)
            first = next(rows, None)
            if first is None:  # and so in every epoch
                raise empty_split_error("train", len(order))
            yield first
            yield from rows

    def _shuffled_rows(self) -> Iterator[PackedRow]:
        """Rows drawn at random from a buffer of `shuffle_rows` rows."""
        draw = random.Random(self.seed)
        buffer: list[PackedRow] = []
        for row in self._rows():
            if len(buffer) < self.shuffle_rows:
                buffer.append(row)
                continue
            index = draw.randrange(len(buffer))
            buffer[index], row = row, buffer[index]
            yield row


def evaluation_batches(
    rows: Sequence[PackedRow], num_rows: int, batch_size: int, num_windows: int, generator: torch.Generator
) -> list[PackedBatch]:
    """Batches of at most `num_rows` rows, evenly spaced over all rows."""
    count = min(num_rows, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return [
        collate(chosen[begin : begin + batch_size], num_windows, generator) for begin in range(0, count, batch_size)
    ]
