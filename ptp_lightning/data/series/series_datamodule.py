"""SeriesDataModule: packed batches of a token series, one document per row."""

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
    """Endless batches. Batch k depends on the keys and on k alone, so iteration can start at any batch.

    Args:
        draw: draws rows.
        collate: turns rows into a batch.
        batch_size: B, rows per batch.
        keys: of the random generators, beside k.
        skip_batches: returns the number of the first batch; called at the start of each iteration.
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
        """Yield endless batches, starting with number `skip_batches`."""
        for batch_index in itertools.count(self.skip_batches()):
            generator = keyed_generator(*self.keys, batch_index)
            yield self.collate(self.draw(self.batch_size, generator), generator)


class SeriesDataModule(PackedDataModule):
    """Rows [bos, t_1, .., t_{S-1}] of a token series: an endless training stream, and fixed rows for evaluation.

    The beginning-of-sequence token `bos` gives the first token of a row a context. Its id is one above the largest id
    of the series. It is never a label and never part of a window, so a model learns to give it almost no probability.

    Windows start `min_context` to `max_context` tokens after `bos`. With 0 and 0 all windows of a row start directly
    after it, as in the paper's experiments on this data. Window sources that sample draw a different continuation for
    each window.

    Args:
        series: source of the tokens.
        row_length: S, tokens per row, including `bos`.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        min_context: minimum number of series tokens before a window.
        max_context: maximum number; by default S - 2, so that at least one token of the row is in the window.
        eval_rows: number of rows used of the validation and of the test split.
        seed: of the rows and of the window positions.
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
        largest = row_length - 2
        max_context = largest if max_context is None else max_context
        if not min_context <= max_context <= largest:
            raise ValueError(
                f"expected data.min_context <= data.max_context <= data.row_length - 2, found {min_context}, "
                f"{max_context} and {largest}"
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
        """The series' tokens and `bos`."""
        return self.series.vocab_size + 1

    @property
    def bos_token_id(self) -> int:
        """The token id at the start of every row."""
        return self.series.vocab_size

    @property
    def end_of_text(self) -> int | None:
        """None: a series has no end-of-text token."""
        return None

    def training_stream(self) -> IterableDataset[PackedBatch]:
        """See `PackedDataModule.training_stream`."""
        return SeriesStream(
            self.series.row_sampler("train", self.row_length - 1),
            self._collate,
            self.batch_size,
            keys=(self.seed, "train", self.shard_spec().rank),
            skip_batches=self.batches_consumed,
        )

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`."""
        shard = self.shard_spec()
        rows = self.series.fixed_rows(split, self.row_length - 1, self.eval_rows)
        generator = keyed_generator(self.seed, split, shard.rank)
        own = rows[shard.rank :: shard.world_size]
        return [self._collate(part, generator) for part in own.split(self.batch_size)]

    def _collate(self, rows: Tensor, generator: torch.Generator) -> PackedBatch:
        """Prepend `bos` to rows `[B, S - 1]` and draw windows."""
        input_ids = torch.nn.functional.pad(rows, (1, 0), value=self.bos_token_id)
        position_ids = torch.arange(self.row_length).expand_as(input_ids)
        context = position_ids - 1  # number of series tokens before each position
        eligible = (context >= self.min_context) & (context <= self.max_context)
        return PackedBatch(
            input_ids,
            torch.zeros_like(input_ids),
            position_ids.contiguous(),
            draw_window_starts(eligible, self.num_windows, generator),
            completion_mask=position_ids >= 1,
        )
