"""StreamingCorpus: packed batches of data of any size, read as a stream that a checkpoint resumes exactly."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packed_datamodule import require_at_least, require_sizes
from ptp_lightning.data.packing import PackedRow, TokenDocument, collate
from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.blocks import Block, BlockSettings, BlockStream, SplitRule
from ptp_lightning.data.streaming.mixture import StreamPart
from ptp_lightning.data.streaming.row_source import Position
from ptp_lightning.data.streaming.stream import evaluation_batches
from ptp_lightning.data.streaming.unusable_rows import (
    OnError,
    count_invalid,
    count_not_learned,
    is_new_magnitude,
    require_rows,
)
from ptp_lightning.data.streaming.worker_processes import loaded_items
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.utils.randomness import keyed_generator

PREFETCHED_BLOCKS = 2  # per worker


class StreamPosition(NamedTuple):
    """Where a batch of a process starts.

    Attributes:
        batch: number of the batch.
        block: number of the block that contains its first row.
        position: at which the block starts; None for the first block.
        row: index of the first row in the block.
    """

    batch: int = 0
    block: int = 0
    position: Position | None = None
    row: int = 0


class StreamStatistics(NamedTuple):
    """What a process has read since it started or resumed.

    Attributes:
        documents: number of packed documents.
        split: how many of them are longer than a row and were split.
        too_short: number of skipped documents of fewer than two tokens.
        invalid: number of skipped invalid rows.
        not_learned: number of documents from which nothing is learned.
    """

    documents: int = 0
    split: int = 0
    too_short: int = 0
    invalid: int = 0
    not_learned: int = 0


class BatchStream(IterableDataset[PackedBatch]):
    """Endless batches of a process, made of blocks. Records where each batch starts that is not yet consumed.

    Args:
        blocks: creates the blocks from a number and a position on.
        start: of the first batch.
        consumed: returns the number of batches consumed by training.
        num_workers: processes that prepare blocks; 0 uses this process.
        batch_size: B, rows per batch.
        num_windows: N, windows per row.
        seed: of the window positions.
        on_error: whether an invalid row raises an error or is skipped.
    """

    def __init__(
        self,
        blocks: Callable[[int, Position | None], BlockStream],
        start: StreamPosition,
        consumed: Callable[[], int],
        *,
        num_workers: int,
        batch_size: int,
        num_windows: int,
        seed: int,
        on_error: OnError,
    ) -> None:
        self._blocks = blocks
        self._consumed = consumed
        self._num_workers = num_workers
        self._batch_size = batch_size
        self._num_windows = num_windows
        self._seed = seed
        self._on_error: OnError = on_error
        self._starts: deque[StreamPosition] = deque([start])
        self.statistics = StreamStatistics()

    def __iter__(self) -> Iterator[PackedBatch]:
        """Batches, starting with the first that was not consumed.

        Raises:
            ValueError: a row is invalid and `on_error` is `raise`, or there is nothing to learn.
        """
        start = self.position_of(self._consumed())
        self._starts = deque([start])
        rows: list[PackedRow] = []  # of the next batch
        number = start.batch
        for block in require_rows(self._load_blocks(start)):
            begin = start.row if block.number == start.block else 0
            for row in range(begin, len(block.rows.input_ids)):
                rows.append(PackedRow(*(tensor[row] for tensor in block.rows)))
                if len(rows) == self._batch_size:
                    generator = keyed_generator(self._seed, "windows", number)
                    number += 1
                    self._starts.append(StreamPosition(number, block.number, block.position, row + 1))
                    self.position_of(self._consumed())  # discards the positions of consumed batches
                    batch = collate(rows, self._num_windows, generator)
                    rows = []
                    yield batch

    def position_of(self, batch: int) -> StreamPosition:
        """Where a batch starts that was already produced, or is the next one; earlier positions are discarded."""
        while self._starts[0].batch < batch:
            self._starts.popleft()
        assert self._starts[0].batch == batch, "the position of this batch was discarded"
        return self._starts[0]

    def _load_blocks(self, start: StreamPosition) -> Iterator[Block]:
        stream = self._blocks(start.block, start.position)
        options: dict[str, Any] = {"num_workers": self._num_workers, "batch_size": None, "collate_fn": _no_collation}
        if self._num_workers:
            options["prefetch_factor"] = PREFETCHED_BLOCKS
        for item in loaded_items(DataLoader(_ErrorsAsItems(stream), **options)):
            if isinstance(item, Exception):
                raise item
            self._count(item)
            yield item

    def _count(self, block: Block) -> None:
        before = self.statistics
        self.statistics = StreamStatistics(
            before.documents + block.num_documents,
            before.split + block.num_split,
            before.too_short + block.num_too_short,
            count_invalid(before.invalid, block.row_errors, self._on_error),
            count_not_learned(before.not_learned, block),
        )
        if block.num_too_short and is_new_magnitude(before.too_short, self.statistics.too_short):
            warnings.warn(
                f"skipped {self.statistics.too_short} documents of fewer than two tokens so far: no window fits",
                stacklevel=2,
            )
        if block.num_split and not before.split:
            warnings.warn(
                f"{block.num_split} of the first {block.num_documents} documents are longer than a row and are split "
                "over several rows; raise data.row_length to split fewer documents",
                stacklevel=2,
            )


class _ErrorsAsItems(IterableDataset[Block | Exception]):
    """Blocks, and the error that ended them as the last item; data loaders wrap raised errors in tracebacks."""

    def __init__(self, blocks: BlockStream) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[Block | Exception]:
        try:
            yield from self._blocks
        except (ValueError, OSError, ImportError) as error:
            yield error


class StreamingCorpus(TextDataModule):
    """Packed batches of a stream of documents: an endless training stream, fixed validation and test rows.

    Documents are read in blocks, and shuffled and packed within each block. A checkpoint contains the position of the
    next batch. A resumed run yields exactly the batches of an uninterrupted run, for any `num_workers`.

    Args:
        parts: components of the mixture: source, rendering and weight.
        tokenizer: of the model: `embedded`, a hub id, a folder or a GGUF file.
        row_length: S, tokens per row.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        eval_parts: components for validation and test, half of the documents each. By default, 5 % of the documents of
            `parts` are for validation and 5 % for testing, by a hash of their content.
        eval_rows: number of rows used of the validation and of the test split, the first ones of the stream.
        shuffle_documents: documents per block; fewer, if they make a megabyte. They are shuffled and packed together,
            and then their rows are shuffled.
        num_workers: processes that tokenise and pack; 0 does it between training steps.
        on_error: `raise` raises an error for an invalid row; `skip` skips and counts it.
        seed: of the order of documents and rows, and of the window positions.

    Raises:
        ValueError: `parts` is empty, or a number is out of range.
    """

    def __init__(
        self,
        parts: list[StreamPart],
        tokenizer: str = "embedded",
        row_length: int = 256,
        batch_size: int = 4,
        num_windows: int = 16,
        eval_parts: list[StreamPart] | None = None,
        eval_rows: int = 32,
        shuffle_documents: int = 512,
        num_workers: int = 0,
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer)
        if not parts:
            raise ValueError("expected at least one source of documents, found none: set data.parts")
        require_sizes(row_length, batch_size, num_windows, eval_rows)
        require_at_least({"shuffle_documents": (shuffle_documents, 1), "num_workers": (num_workers, 0)})
        self.parts = parts
        self.row_length = row_length
        self.batch_size = batch_size
        self.num_windows = num_windows
        self.eval_parts = eval_parts
        self.eval_rows = eval_rows
        self.shuffle_documents = shuffle_documents
        self.num_workers = num_workers
        self.on_error: OnError = on_error
        self.seed = seed
        self._stream: BatchStream | None = None
        self._loaded_positions: list[StreamPosition] | None = None  # of all ranks
        self._loaded_identity: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and check that all renderings can use it.

        Raises:
            ValueError: a rendering cannot use it.
        """
        super().setup(stage)
        for part in [*self.parts, *(self.eval_parts or [])]:
            part.effective_rendering.require_tokenizer(self.require_tokenizer())

    @property
    def statistics(self) -> StreamStatistics:
        """What this process has read for training so far."""
        return StreamStatistics() if self._stream is None else self._stream.statistics

    def training_stream(self) -> BatchStream:
        """See `PackedDataModule.training_stream`.

        Raises:
            ValueError: the checkpoint was written by a different number of processes, or from a different stream.
        """
        if self._loaded_identity is not None and self._loaded_identity != self._identity():
            raise ValueError(
                f"expected the stream that the checkpoint was written from, {self._loaded_identity}, found "
                f"{self._identity()}: the stored position is valid for that stream only; set data as before, or start "
                "from the weights alone"
            )
        shard = self.shard_spec()
        positions = [StreamPosition()] * shard.world_size if self._loaded_positions is None else self._loaded_positions
        if len(positions) != shard.world_size:
            raise ValueError(
                f"expected {len(positions)} processes, which the checkpoint was written by, found {shard.world_size}: "
                "every process has its own position in the stream; set trainer.devices and num_nodes as before"
            )
        start = positions[shard.rank] if self._stream is None else self._stream.position_of(self.batches_consumed())
        settings = self._block_settings("none" if self.eval_parts else "hash")
        parts = self.parts

        def blocks(number: int, position: Position | None) -> BlockStream:
            return BlockStream(parts, shard, settings, "train", number, position)

        self._stream = BatchStream(
            blocks,
            start,
            self.batches_consumed,
            num_workers=self.num_workers,
            batch_size=self.batch_size,
            num_windows=self.num_windows,
            seed=self.seed,
            on_error=self.on_error,
        )
        return self._stream

    def training_documents(self, num_documents: int | None) -> Iterator[TokenDocument]:
        """See `TextDataModule.training_documents`; the first documents of the stream.

        Raises:
            ValueError: a row is invalid and `on_error` is `raise`.
        """
        del num_documents  # the caller stops reading
        settings = self._block_settings("none" if self.eval_parts else "hash")
        num_invalid = 0
        for block in BlockStream(self.parts, ShardSpec(), settings, single_epoch=True).documents():
            num_invalid = count_invalid(num_invalid, block.row_errors, self.on_error)
            yield from block.documents

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`.

        Raises:
            ValueError: the split has no document of two or more tokens, or a row is invalid.
            FileNotFoundError: a source does not exist.
        """
        parts, split_rule = (self.eval_parts, "halves") if self.eval_parts else (self.parts, "hash")
        settings = self._block_settings(split_rule)
        blocks = BlockStream(parts, self.shard_spec(), settings, split, single_epoch=True)
        rows: list[PackedRow] = []
        num_invalid = num_not_learned = 0
        for block in require_rows(blocks):
            num_invalid = count_invalid(num_invalid, block.row_errors, self.on_error)
            num_not_learned = count_not_learned(num_not_learned, block)
            rows.extend(PackedRow(*tensors) for tensors in zip(*block.rows, strict=True))
            if len(rows) >= self.eval_rows:
                break
        if not rows:
            raise ValueError(
                f"expected documents of two or more tokens in the {split} split, found none: by default it contains "
                "5 % of the documents, by a hash of their content; set data.eval_parts"
            )
        generator = keyed_generator(self.seed, split)
        return evaluation_batches(rows[: self.eval_rows], self.eval_rows, self.batch_size, self.num_windows, generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch of each process starts; prefetched batches are not counted."""
        positions = [tuple(position) for position in self._positions()]
        return super().state_dict() | {"positions": positions, "stream": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `PackedDataModule.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._loaded_positions = [StreamPosition(*position) for position in state_dict["positions"]]
        self._loaded_identity = state_dict["stream"]

    def _identity(self) -> dict[str, Any]:
        """The settings on which rows depend, without the location and content of files."""
        parts = [
            [type(part.source).__name__, type(part.effective_rendering).__name__, part.weight] for part in self.parts
        ]
        sizes = {"row_length": self.row_length, "shuffle_documents": self.shuffle_documents, "seed": self.seed}
        return {"parts": parts, "has_eval_parts": bool(self.eval_parts)} | sizes

    def _positions(self) -> list[StreamPosition]:
        if self._stream is None:
            return self._loaded_positions or [StreamPosition()]
        own = self._stream.position_of(self.batches_consumed())
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [own]
        positions: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(positions, own)  # all ranks write a checkpoint together
        return positions

    def _block_settings(self, split_rule: SplitRule) -> BlockSettings:
        return BlockSettings(self.require_tokenizer(), self.row_length, self.shuffle_documents, self.seed, split_rule)


def _no_collation(item: Block | Exception) -> Block | Exception:
    return item
