"""RaggedCache: keys and values of several rows at once, each row with a length of its own.

What a call writes lies behind the kept tokens of each row and is written over by the next one, unless `keep` says how
much of it stays. So a rejected draft moves no memory, and rows that accept different numbers of tokens stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RaggedCache(Cache):
    """A transformers cache whose rows grow by `keep` alone.

    Args:
        num_rows: B.
        capacity: tokens a row has room for at first; more are made room for, at the cost of a copy.

    Attributes:
        lengths: kept tokens of each row.
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.lengths = [0] * num_rows
        self.capacity = capacity
        self._columns: Tensor | None = None
        super().__init__(layer_class_to_replicate=partial(_RaggedLayer, self))  # pyright: ignore[reportArgumentType]

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens that the latest call wrote, the first `counts[b]` of row b stay."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._columns = None

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what is not kept is gone."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self._columns = None
        index = torch.tensor(rows)
        for layer in self.layers:
            assert isinstance(layer, _RaggedLayer)
            layer.select(index)

    def columns(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """`[B, T]`, where the next T tokens of each row are written; None if it is the same place in all rows."""
        if len(set(self.lengths)) == 1:
            return None
        if self._columns is None or self._columns.shape[1] != num_tokens:
            offsets = torch.arange(num_tokens, device=device)
            self._columns = torch.tensor(self.lengths, device=device).unsqueeze(1) + offsets
        return self._columns


class HasCapacity(Protocol):
    """Attributes: how many columns there is room for at first."""

    capacity: int


AnyCache = TypeVar("AnyCache", bound=HasCapacity)


class LayerWithRoom(CacheLayerMixin, Generic[AnyCache]):
    """One layer's keys and values, `[B, heads, capacity, head size]`; zeros where nothing was ever written."""

    is_sliding = False

    def __init__(self, cache: AnyCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because masked keys must be finite.
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._cache.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True


class _RaggedLayer(LayerWithRoom["RaggedCache"]):
    """Of rows that end at different places."""

    is_croppable = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, heads, T, head size]` behind each row; returns all columns up to the longest row's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_tokens = key_states.shape[2]
        end = max(self._cache.lengths) + num_tokens
        self.keys = self._written(self.keys, key_states, end)
        self.values = self._written(self.values, value_states, end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _written(self, store: Tensor | None, states: Tensor, end: int) -> Tensor:
        assert store is not None
        if end > store.shape[2]:
            room = max(end, 2 * store.shape[2]) - store.shape[2]
            store = torch.cat([store, store.new_zeros(*store.shape[:2], room, store.shape[3])], dim=2)
        columns = self._cache.columns(states.shape[2], states.device)
        if columns is None:
            store[:, :, end - states.shape[2] : end] = states
        else:
            rows = torch.arange(len(store), device=store.device).unsqueeze(1)
            store[rows, :, columns] = states.transpose(1, 2)
        return store

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        return max(self._cache.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self._cache.lengths) + query_length, 0

    def get_max_length(self) -> int:
        return -1
