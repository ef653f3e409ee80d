"""SeriesDataModule: token series as packed batches, a row being one document."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packed_datamodule import PackedDataModule, require_at_least, require_sizes
from ptp_lightning.data.packing import draw_window_starts
from ptp_lightning.data.series.series import RowSampler, Series
from ptp_lightning.utils.randomness import keyed_generator


class SeriesStream(IterableDataset[PackedBatch]):
    """Endless batches; batch k is a function of its keys and k alone, so any of them can be the first.

    Args:
        draw: gives the rows.
        collate: makes a batch of rows.
        batch_size: B, rows per batch.
        keys: of every draw, beside k.
        skip_batches: number of the first batch; asked each time an iteration starts.
    """

    def __init__(
        self,
        draw: RowSampler,
        collate: Callable[[Tensor, torch.Generator], PackedBatch],
        batch_size: int,
        keys: tuple[int | str, ...],
        skip_batches: Callable[[], int],
    ) -> None:
        self.draw = draw
        self.collate = collate
        self.batch_size = batch_size
        self.keys = keys
        self.skip_batches = skip_batches

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches from number `skip_batches` on, for ever."""
        for batch_index in itertools.count(self.skip_batches()):
            generator = keyed_generator(*self.keys, batch_index)
            yield self.collate(self.draw(self.batch_size, generator), generator)


class SeriesDataModule(PackedDataModule):
    """Rows [beginning, t_1, .., t_{S-1}] of a token series: an endless training stream, fixed rows for evaluation.

    The beginning is a token id of its own, one above the series' largest, so that the first token of a row has
    something before it too. It is never a label, nor part of a window: a model learns that it does not occur, and gives
    it next to no probability.

    Windows start `min_context` to `max_context` tokens after the beginning; 0 and 0 put every window of a row right
    after it (windows without context, as in the paper's experiments on such data), where sources that sample draw
    another continuation for each of them.

    Args:
        series: what the tokens are.
        row_length: S, tokens per row, the beginning counted.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        min_context: tokens of the series that stand before a window at least.
        max_context: the same at most; by default S - 2, so that one token of the row is left for the window.
        eval_rows: rows of the validation and of the test split that are used.
        seed: of every draw in here.
    """

    def __init__(
        self,
        series: Series,
        row_length: int = 33,
        batch_size: int = 32,
        num_windows: int = 1,
        min_context: int = 0,
        max_context: int | None = None,
        eval_rows: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(row_length, batch_size, num_windows, eval_rows)
        require_at_least({"min_context": (min_context, 0)})
        most = row_length - 2
        max_context = most if max_context is None else max_context
        if not min_context <= max_context <= most:
            raise ValueError(
                f"expected data.min_context <= data.max_context <= data.row_length - 2, found {min_context}, "
                f"{max_context} and {most}"
            )
        self.series = series
        self.row_length = row_length
        self.batch_size = batch_size
        self.num_windows = num_windows
        self.min_context = min_context
        self.max_context = max_context
        self.eval_rows = eval_rows
        self.seed = seed

    @property
    def vocab_size(self) -> int:
        """The series' tokens and the beginning."""
        return self.series.vocab_size + 1

    @property
    def beginning(self) -> int:
        """The token id that starts every row."""
        return self.series.vocab_size

    @property
    def end_of_text(self) -> int | None:
        """None: a series does not end."""
        return None

    def training_stream(self) -> IterableDataset[PackedBatch]:
        """See `PackedDataModule.training_stream`."""
        rank, _ = self.rank_and_world()
        return SeriesStream(
            self.series.row_sampler("train", self.row_length - 1),
            self._collate,
            self.batch_size,
            keys=(self.seed, "train", rank),
            skip_batches=self.batches_consumed,
        )

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`."""
        rank, world = self.rank_and_world()
        rows = self.series.fixed_rows(split, self.row_length - 1, self.eval_rows)
        generator = keyed_generator(self.seed, split, rank)
        return [self._collate(part, generator) for part in rows[rank::world].split(self.batch_size)]

    def _collate(self, rows: Tensor, generator: torch.Generator) -> PackedBatch:
        """Put the beginning before rows `[B, S - 1]` and draw windows."""
        input_ids = torch.nn.functional.pad(rows, (1, 0), value=self.beginning)
        position_ids = torch.arange(self.row_length).expand_as(input_ids)
        context = position_ids - 1  # tokens of the series before each place
        eligible = (context >= self.min_context) & (context <= self.max_context)
        return PackedBatch(
            input_ids,
            torch.zeros_like(input_ids),
            position_ids.contiguous(),
            draw_window_starts(eligible, self.num_windows, generator),
            completion_mask=position_ids >= 1,
        )
