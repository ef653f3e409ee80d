"""Which keys windows see, and groups of windows that attend at once, each over no more context than it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.sampling import allows_dynamic_shapes

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
    _groups: dict[int, list[Group]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def groups(self, num_heads: int) -> Sequence[Group]:
        """All windows of all rows, in groups whose size depends on how many heads attend.

        Windows are taken in their order. Where starts ascend, as data modules draw them, the first groups see little.
        Where asking for values would wait for the device, groups are whole rows and see all.
        """
        if num_heads not in self._groups:  # the same in all layers and in the backward pass
            find = self._by_what_they_see if allows_dynamic_shapes(self.context) else self._whole_rows
            self._groups[num_heads] = list(find(num_heads))
        return self._groups[num_heads]

    def biases(self, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What to add to scores: 0, or minus infinity where a key is hidden; `[R, n, c]` and `[Q, K]`."""
        seen = self.context[group.rows, group.windows, group.columns]
        return _bias(seen, dtype), _bias(self.own, dtype)

    def _whole_rows(self, num_heads: int) -> Iterator[Group]:
        num_rows, num_windows, size = self.context.shape
        for rows in _evenly(num_rows, max(GROUP_SCORES_GPU // (num_windows * self._scores(num_heads)), 1)):
            yield Group(rows, slice(0, num_windows), slice(0, size))

    def _by_what_they_see(self, num_heads: int) -> Iterator[Group]:
        num_rows, num_windows, size = self.context.shape
        seen = self.context.to(torch.uint8)  # no argmax of bool
        # Of each window [B, N]: hidden tokens before all that it sees, and behind.
        before, behind = seen.argmax(-1).numpy(), seen.flip(-1).argmax(-1).numpy()
        at_once = max(GROUP_SCORES_CPU // self._scores(num_heads), LEAST_WINDOWS)
        for rows in _evenly(num_rows, max(at_once // num_windows, 1)):
            for windows in _evenly(num_windows, at_once):
                own = rows, windows
                yield Group(rows, windows, slice(int(before[own].min()), size - int(behind[own].min())))

    def _scores(self, num_heads: int) -> int:
        """Of a window."""
        return num_heads * self.own.shape[0] * (self.context.shape[-1] + self.own.shape[1])


def _evenly(length: int, most: int) -> Iterator[slice]:
    """`length` cut into as few parts of at most `most` as there can be, of about the same size."""
    parts = math.ceil(length / most)
    ends = [length * part // parts for part in range(parts + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends))


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return seen.new_zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
