"""ShardSpec: which part of the data a process reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class ShardSpec:
    """Every `world_size`-th item, starting with item number `rank`.

    Args:
        rank: of the process, 0 .. world_size - 1.
        world_size: number of processes.

    >>> ShardSpec(rank=1, world_size=3).select("abcdefg")
    'be'
    >>> ShardSpec(rank=1, world_size=3).owns(4)
    True
    """

    rank: int = 0
    world_size: int = 1

    def owns(self, number: int) -> bool:
        """Whether item `number`, counted from 0, belongs to this process."""
        return number % self.world_size == self.rank

    def select(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process."""
        return items[self.rank :: self.world_size]
