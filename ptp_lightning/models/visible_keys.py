"""Which keys windows see, and groups of windows that attend at once, each over no more context than it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP_SCORES_CPU = 2**18
"""Scores of a group, which a processor's cache holds with what is made of them; see `LEAST_WINDOWS`."""
LEAST_WINDOWS = 8
"""Fewer windows at once, unless there are no more in a row, make a slow matrix product."""
GROUP_SCORES_GPU = 2**20


class Group(NamedTuple):
    """Some windows of some rows.

    Attributes:
        rows: of B.
        windows: of N.
        columns: of S, the context tokens that one of these windows sees, and those in between.
    """

    rows: slice
    windows: slice
    columns: slice


@dataclass(frozen=True)
class VisibleKeys:
    """What queries see.

    Attributes:
        context: `[B, N, S]` bool, true where all queries of a window see a context token.
        own: `[Q, K]` bool, true where a query of a window sees a key of this window; each query sees one at least.
    """

    context: Tensor
    own: Tensor

    def groups(self, num_heads: int) -> Iterator[Group]:
        """All windows of all rows, in groups whose size depends on how many heads attend.

        Windows are taken in their order. Where starts ascend, as data modules draw them, the first groups see little.
        On a GPU groups are whole rows and see all: what a window sees is not known without waiting for the device.
        """
        num_rows, num_windows, size = self.context.shape
        scores = num_heads * self.own.shape[0] * (size + self.own.shape[1])  # of a window
        if self.context.is_cuda:
            rows_at_once = max(GROUP_SCORES_GPU // (num_windows * scores), 1)
            for rows in _evenly(num_rows, rows_at_once):
                yield Group(rows, slice(0, num_windows), slice(0, size))
            return
        at_once = max(GROUP_SCORES_CPU // scores, LEAST_WINDOWS)
        for rows in _evenly(num_rows, max(at_once // num_windows, 1)):
            for windows in _evenly(num_windows, at_once):
                yield Group(rows, windows, self._columns(rows, windows))

    def biases(self, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What to add to scores: 0, or minus infinity where a key is hidden; `[R, n, c]` and `[Q, K]`."""
        seen = self.context[group.rows, group.windows, group.columns]
        return _bias(seen, dtype), _bias(self.own, dtype)

    def _columns(self, rows: slice, windows: slice) -> slice:
        before, behind = (hidden[rows, windows].min() for hidden in self._hidden)
        return slice(int(before), self.context.shape[-1] - int(behind))

    @cached_property
    def _hidden(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many context tokens lie before all that a window sees, and how many behind: `[B, N]`."""
        seen = self.context.to(torch.uint8)  # no argmax of bool
        return seen.argmax(-1).numpy(), seen.flip(-1).argmax(-1).numpy()


def _evenly(length: int, most: int) -> Iterator[slice]:
    """`length` cut into as few parts of at most `most` as there can be, of about the same size."""
    parts = math.ceil(length / most)
    ends = [length * part // parts for part in range(parts + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends))


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return seen.new_zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
