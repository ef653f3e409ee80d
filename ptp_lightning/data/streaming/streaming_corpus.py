"""StreamingCorpus: data of any size as packed batches, read as a stream that a checkpoint can go on with exactly."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packed_datamodule import require_at_least, require_sizes
from ptp_lightning.data.packing import PackedRow, TokenDocument, collate
from ptp_lightning.data.streaming.blocks import Block, BlockSettings, BlockStream, Division
from ptp_lightning.data.streaming.mixture import StreamPart
from ptp_lightning.data.streaming.row_source import Position, Share
from ptp_lightning.data.streaming.stream import evaluation_batches
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.utils.randomness import keyed_generator

OnError = Literal["raise", "skip"]
LARGEST_EMPTY_RUN = 1000  # blocks in a row without anything to be learned, after which nothing is hoped for
BLOCKS_AHEAD = 2  # that each worker has ready


class StreamPosition(NamedTuple):
    """Where a batch of a process begins.

    Attributes:
        batch: its number.
        block: the number of the block that its first row stands in.
        position: where that block begins; None for the first.
        row: the row's place in the block.
    """

    batch: int = 0
    block: int = 0
    position: Position | None = None
    row: int = 0


class StreamReport(NamedTuple):
    """What a process has read of the stream since it began or went on.

    Attributes:
        documents: that were packed.
        long: how many of them were cut, because they do not fit into a row.
        short: documents of fewer than two tokens, which were left out.
        unusable: broken rows, which were left out.
    """

    documents: int = 0
    long: int = 0
    short: int = 0
    unusable: int = 0


class BatchStream(IterableDataset[PackedBatch]):
    """Endless batches of a process, made of blocks; knows where each batch that is still under way begins.

    Args:
        blocks: from a number and a position on.
        start: of the first batch.
        consumed: is asked each time an iteration starts, and says how many batches were trained on in all.
        num_workers: processes that make blocks; 0 for this one.
        batch_size: B.
        num_windows: N.
        seed: of the windows.
        on_error: whether an unusable row ends the run.
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
        self._begins: deque[StreamPosition] = deque([start])
        self.report = StreamReport()

    def __iter__(self) -> Iterator[PackedBatch]:
        """Batches from the first on that was not trained on.

        Raises:
            ValueError: a row cannot be used and `on_error` is `raise`, or there is nothing to be learned.
        """
        start = self.position_of(self._consumed())
        self._begins = deque([start])
        waiting: list[PackedRow] = []
        places: list[tuple[Block, int]] = []  # of the rows that wait
        number = start.batch
        for block in _not_all_empty(self._loaded_blocks(start)):
            begin = start.row if block.number == start.block else 0
            for row in range(begin, len(block.rows.input_ids)):
                waiting.append(PackedRow(*(tensor[row] for tensor in block.rows)))
                places.append((block, row + 1))
                if len(waiting) == self._batch_size:
                    generator = keyed_generator(self._seed, "windows", number)
                    number += 1
                    last, behind = places[-1]
                    self._begins.append(StreamPosition(number, last.number, last.position, behind))
                    self.position_of(self._consumed())  # forgets the others, or they would become many
                    batch = collate(waiting, self._num_windows, generator)
                    waiting, places = [], []
                    yield batch

    def position_of(self, batch: int) -> StreamPosition:
        """Where a batch begins that has been made, or is the next to be made; earlier ones are forgotten."""
        while self._begins[0].batch < batch:
            self._begins.popleft()
        assert self._begins[0].batch == batch, "asked for a batch that was forgotten"
        return self._begins[0]

    def _loaded_blocks(self, start: StreamPosition) -> Iterator[Block]:
        stream = self._blocks(start.block, start.position)
        options: dict[str, Any] = {"num_workers": self._num_workers, "batch_size": None, "collate_fn": _as_it_is}
        if self._num_workers:
            options["prefetch_factor"] = BLOCKS_AHEAD
        for found in DataLoader(_ErrorsHandedOver(stream), **options):
            if isinstance(found, Exception):
                raise found
            self._take_note(found)
            yield found

    def _take_note(self, block: Block) -> None:
        before = self.report
        self.report = StreamReport(
            before.documents + block.num_documents,
            before.long + block.num_long,
            before.short + block.num_short,
            _count_unusable(before.unusable, block.complaints, self._on_error),
        )
        if block.num_short and _new_magnitude(before.short, self.report.short):
            warnings.warn(
                f"left out {self.report.short} documents of fewer than two tokens so far: no window can start in them",
                stacklevel=2,
            )
        if block.num_long and not before.long:
            warnings.warn(
                f"{block.num_long} of the first {block.num_documents} documents are longer than a row and are cut into "
                "several; raise data.row_length to keep more of them whole",
                stacklevel=2,
            )


class _ErrorsHandedOver(IterableDataset[Block | Exception]):
    """Blocks and, at last, what ended them: an error that a worker raises would arrive buried in tracebacks."""

    def __init__(self, blocks: BlockStream) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[Block | Exception]:
        try:
            yield from self._blocks
        except (ValueError, FileNotFoundError) as error:
            yield error


class StreamingCorpus(TextDataModule):
    """Packed batches of a stream of documents: an endless training stream, fixed validation and test rows.

    Documents are read in blocks, and shuffled and packed inside each. A checkpoint holds where the next batch begins;
    the run that goes on from it sees exactly what the other would have seen, whatever `num_workers` is.

    Args:
        parts: sources, how their rows become tokens, and their weights.
        tokenizer: whose tokens: `embedded`, a hub id, a folder or a GGUF file; the one of the model.
        row_length: S, tokens per row.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        eval_parts: sources of the validation and test rows, half of their documents each; by default 5 of 100
            documents of `parts` each, by a hash of their content.
        eval_rows: rows of the validation and of the test split that are used, the first ones of the stream.
        shuffle_documents: documents that make a block, or fewer, as many as make a megabyte; they are shuffled and
            packed together, and then their rows are shuffled.
        num_workers: processes that tokenise and pack; 0 does it between training steps.
        on_error: `raise` ends the run at a row that cannot be used; `skip` leaves it out and counts.
        seed: of every draw in here.

    Raises:
        ValueError: there are no parts, or a number is out of range.
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
        self._loaded_positions: list[StreamPosition] | None = None  # of all processes
        self._loaded_identity: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and see that it can do what the parts ask of it.

        Raises:
            ValueError: it cannot.
        """
        super().setup(stage)
        for part in [*self.parts, *(self.eval_parts or [])]:
            part.renders.require_tokenizer(self.require_tokenizer())

    @property
    def report(self) -> StreamReport:
        """What this process has read for training so far."""
        return StreamReport() if self._stream is None else self._stream.report

    def training_stream(self) -> BatchStream:
        """See `PackedDataModule.training_stream`.

        Raises:
            ValueError: the checkpoint was written by another number of processes, or from another stream.
        """
        if self._loaded_identity is not None and self._loaded_identity != self._identity():
            raise ValueError(
                f"expected the stream that the checkpoint was written from, {self._loaded_identity}, found "
                f"{self._identity()}: places in the one mean nothing in the other; set data, or begin anew with "
                "weights alone"
            )
        rank, world = self.rank_and_world()
        positions = [StreamPosition()] * world if self._loaded_positions is None else self._loaded_positions
        if len(positions) != world:
            raise ValueError(
                f"expected {len(positions)} processes, which the checkpoint was written by, found {world}: each has a "
                "place of its own in the stream; set trainer.devices and num_nodes as before"
            )
        start = positions[rank] if self._stream is None else self._stream.position_of(self.batches_consumed())
        settings = self._block_settings("none" if self.eval_parts else "hash")
        parts = self.parts

        def blocks(number: int, position: Position | None) -> BlockStream:
            return BlockStream(parts, Share(rank, world), settings, "train", number, position)

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

    def training_documents(self, wanted: int | None) -> Iterator[TokenDocument]:
        """See `TextDataModule.training_documents`; the first ones of the stream.

        Raises:
            ValueError: a row cannot be used and `on_error` is `raise`.
        """
        del wanted  # whoever has enough stops reading
        settings = self._block_settings("none" if self.eval_parts else "hash")
        unusable = 0
        for block in BlockStream(self.parts, Share(), settings, once=True).documents():
            unusable = _count_unusable(unusable, block.complaints, self.on_error)
            yield from block.documents

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`.

        Raises:
            ValueError: the split has no document of two or more tokens, or a row of it cannot be used.
            FileNotFoundError: there is nothing to read.
        """
        parts, division = (self.eval_parts, "halves") if self.eval_parts else (self.parts, "hash")
        share = Share(*self.rank_and_world())
        blocks = BlockStream(parts, share, self._block_settings(division), split, once=True)
        rows: list[PackedRow] = []
        unusable = 0
        for block in _not_all_empty(blocks):
            unusable = _count_unusable(unusable, block.complaints, self.on_error)
            rows.extend(PackedRow(*tensors) for tensors in zip(*block.rows, strict=True))
            if len(rows) >= self.eval_rows:
                break
        if not rows:
            raise ValueError(
                f"expected documents of two or more tokens in the {split} split, found none: 5 of 100 documents belong "
                "to it by a hash of their content; set data.eval_parts"
            )
        generator = keyed_generator(self.seed, split)
        return evaluation_batches(rows[: self.eval_rows], self.eval_rows, self.batch_size, self.num_windows, generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch of each process begins; batches that were only prefetched do not count."""
        positions = [tuple(position) for position in self._positions()]
        return super().state_dict() | {"positions": positions, "stream": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `PackedDataModule.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._loaded_positions = [StreamPosition(*position) for position in state_dict["positions"]]
        self._loaded_identity = state_dict["stream"]

    def _identity(self) -> dict[str, Any]:
        """What rows depend on, but for the files' places and content."""
        parts = [[type(part.source).__name__, type(part.renders).__name__, part.weight] for part in self.parts]
        sizes = {"row_length": self.row_length, "shuffle_documents": self.shuffle_documents, "seed": self.seed}
        return {"parts": parts, "has_eval_parts": bool(self.eval_parts)} | sizes

    def _positions(self) -> list[StreamPosition]:
        if self._stream is None:
            return self._loaded_positions or [StreamPosition()]
        own = self._stream.position_of(self.batches_consumed())
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [own]
        positions: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(positions, own)  # a checkpoint is written by all processes together
        return positions

    def _block_settings(self, division: Division) -> BlockSettings:
        return BlockSettings(self.require_tokenizer(), self.row_length, self.shuffle_documents, self.seed, division)


def _not_all_empty(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks, until it is clear that no more rows will come of them."""
    empty = 0
    for block in blocks:
        yield block
        empty = 0 if len(block.rows.input_ids) else empty + 1
        if empty > LARGEST_EMPTY_RUN:
            raise ValueError(
                f"expected documents with something to be learned, found none in {empty} blocks: set data.parts"
            )


def _count_unusable(before: int, complaints: Sequence[str], on_error: OnError) -> int:
    """How many rows were left out by now; says so now and then, or raises at the first."""
    if complaints and on_error == "raise":
        raise ValueError(f"{complaints[0]}; data.on_error: skip leaves such rows out")
    now = before + len(complaints)
    if complaints and _new_magnitude(before, now):
        warnings.warn(
            f"left out {now} unusable rows so far (data.on_error: skip), the latest: {complaints[-1]}", stacklevel=3
        )
    return now


def _as_it_is(found: Block | Exception) -> Block | Exception:
    return found


def _new_magnitude(before: int, now: int) -> bool:
    """Whether a count has reached another power of ten, so that messages become rare."""
    return len(str(now)) > len(str(before)) or before == 0
