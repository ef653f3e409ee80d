"""DocumentStream: documents as an endless stream of packed batches that can be begun anywhere."""

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

AnyDocument = TypeVar("AnyDocument")


def no_rows(split: Split, num_documents: int) -> ValueError:
    """What to raise where documents make no row."""
    return ValueError(
        f"expected a document of two or more tokens in the {split} split, found none among {num_documents} documents "
        "of this process: set data.corpus (there must be one for each process)"
    )


class StreamSettings(TypedDict):
    """Everything about a stream but its documents.

    Attributes:
        batch_size: B, rows per batch.
        num_windows: N, windows per row.
        shuffle_rows: rows held back to be drawn from in random order, so that a batch mixes documents.
        seed: of the document order, the row order and the windows.
        skip_batches: batches that were consumed before, 0 by default; a function is asked each time an iteration
            starts.
    """

    batch_size: int
    num_windows: int
    shuffle_rows: int
    seed: int
    skip_batches: NotRequired[int | Callable[[], int]]


class DocumentStream(IterableDataset[PackedBatch], ABC, Generic[AnyDocument]):
    """An endless, seeded stream of packed batches over shuffled epochs of the documents.

    Batch k is a function of the documents, the settings and k alone, so a stream that starts with `skip_batches = k`
    continues one that was stopped after k batches.

    Args:
        documents: the training documents of this rank, in whatever form `packed` understands.
        **settings: see `StreamSettings`.
    """

    def __init__(self, documents: Sequence[AnyDocument], **settings: Unpack[StreamSettings]) -> None:
        self.documents = documents
        self.batch_size = settings["batch_size"]
        self.num_windows = settings["num_windows"]
        self.shuffle_rows = settings["shuffle_rows"]
        self.seed = settings["seed"]
        self.skip_batches = settings.get("skip_batches", 0)

    @abstractmethod
    def packed(self, documents: Sequence[AnyDocument]) -> Iterator[PackedRow]:
        """Rows of these documents, in this order."""

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches from number `skip_batches` on, for ever.

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
        """Rows of all epochs, each epoch in an order of its own."""
        for epoch in itertools.count():
            order = list(self.documents)
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            rows = self.packed(order)
            first = next(rows, None)
            if first is None:  # it would be no better in the next epoch
                raise no_rows("train", len(order))
            yield first
            yield from rows

    def _shuffled_rows(self) -> Iterator[PackedRow]:
        """Rows drawn at random from a buffer of the next `shuffle_rows`."""
        draw = random.Random(self.seed)
        buffer: list[PackedRow] = []
        for row in self._rows():
            if len(buffer) < self.shuffle_rows:
                buffer.append(row)
                continue
            place = draw.randrange(len(buffer))
            buffer[place], row = row, buffer[place]
            yield row


def evaluation_batches(
    rows: Sequence[PackedRow], num_rows: int, batch_size: int, num_windows: int, generator: torch.Generator
) -> list[PackedBatch]:
    """Batches of at most `num_rows` rows, taken evenly over all of them."""
    count = min(num_rows, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return [
        collate(chosen[begin : begin + batch_size], num_windows, generator) for begin in range(0, count, batch_size)
    ]
