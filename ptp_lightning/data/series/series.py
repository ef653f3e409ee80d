"""Token series: token sequences that are not text, read in rows of equal length.

A new series is one class with `vocab_size`, `row_sampler` and `fixed_rows`. A recorded series in memory is a
`RecordedSeries` with `vocab_size` and `blocks`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ptp_lightning.data.corpus import Split

RowSampler = Callable[[int, torch.Generator], Tensor]
"""(number of rows, source of randomness) to token ids `[rows, length]`, int64."""


class Series(ABC):
    """A sequence over a small vocabulary with a training, a validation and a test part."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are 0 .. vocab_size - 1."""

    @abstractmethod
    def row_sampler(self, split: Split, length: int) -> RowSampler:
        """A function that draws rows of `length` consecutive tokens of a split; equal seeds give equal rows."""

    @abstractmethod
    def fixed_rows(self, split: Split, length: int, count: int) -> Tensor:
        """At most `count` rows `[rows, length]` of a split, int64, the same on every call."""


class RecordedSeries(Series):
    """A series in memory, in blocks that each belong to one split. No row contains tokens of two blocks."""

    @abstractmethod
    def blocks(self, split: Split) -> list[np.ndarray]:
        """The blocks of a split in the order of the series, each a 1-D int64 array."""

    def tokens(self, split: Split) -> np.ndarray:
        """All tokens of a split, block after block, int64."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.blocks(split)])

    def row_sampler(self, split: Split, length: int) -> RowSampler:
        """Rows that start at any position of a block with equal probability; see `Series.row_sampler`.

        Raises:
            ValueError: no block of the split is long enough.
        """
        tokens, starts = self._tokens_and_starts(split, length, step=1)
        offsets = torch.arange(length)

        def draw(count: int, generator: torch.Generator) -> Tensor:
            chosen = starts[torch.randint(len(starts), (count,), generator=generator)]
            return tokens[chosen.unsqueeze(-1) + offsets]

        return draw

    def fixed_rows(self, split: Split, length: int, count: int) -> Tensor:
        """Rows that do not overlap, evenly spaced over the split; see `Series.fixed_rows`.

        Raises:
            ValueError: no block of the split is long enough.
        """
        tokens, starts = self._tokens_and_starts(split, length, step=length)
        count = min(count, len(starts))
        chosen = starts[torch.arange(count) * len(starts) // count]
        return tokens[chosen.unsqueeze(-1) + torch.arange(length)]

    def _tokens_and_starts(self, split: Split, length: int, step: int) -> tuple[Tensor, Tensor]:
        """The tokens of a split, and the positions at which rows may start: every `step` tokens of each block."""
        starts: list[Tensor] = []
        begin = 0
        for block in self.blocks(split):
            starts.append(torch.arange(begin, begin + len(block) - length + 1, step) if len(block) >= length else _NONE)
            begin += len(block)
        joined = torch.cat([_NONE, *starts])
        if not len(joined):
            raise ValueError(
                f"expected a block of at least {length} tokens in the {split} split, found {len(starts)} shorter "
                "ones: lower data.row_length or data.series.block_length, or set data.series to a longer series"
            )
        return torch.from_numpy(self.tokens(split)), joined


_NONE = torch.zeros(0, dtype=torch.int64)
