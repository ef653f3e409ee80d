"""RaggedCache: keys and values of several rows that have different lengths.

A call writes after the kept tokens of each row, and the next call overwrites what it wrote, except for the tokens that
`keep` adds to the kept ones. So a rejected draft moves no memory, and rows that accept different numbers of tokens stay
in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMN_MULTIPLE = 64  # the memory of each head and of each block of positions is aligned alike in every cache


class RaggedCache(Cache):
    """A transformers cache whose rows grow only by `keep`.

    Args:
        num_rows: B.
        capacity: initial number of columns, rounded up to a multiple of `COLUMN_MULTIPLE`; if a row needs more, the
            cache grows by a copy.

    Attributes:
        lengths: number of kept tokens of each row.

    >>> cache = RaggedCache(num_rows=2, capacity=4)
    >>> _ = cache.update(torch.ones(2, 1, 3, 1), torch.ones(2, 1, 3, 1), 0)  # a call of three tokens, in layer 0
    >>> cache.keep([3, 1])  # all of them are accepted in the first row, one in the second
    >>> cache.lengths
    [3, 1]
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.lengths = [0] * num_rows
        self.capacity = -(-capacity // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        self._columns: Tensor | None = None
        super().__init__(layer_class_to_replicate=partial(_RaggedLayer, self))  # pyright: ignore[reportArgumentType]

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` tokens that the latest call wrote to row b."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._columns = None

    def write(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """As `update`; returns all columns of the layer, `[B, heads, capacity, head size]`."""
        self.update(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        assert isinstance(layer, _RaggedLayer) and layer.keys is not None and layer.values is not None
        return layer.keys, layer.values

    def reserve(self, layer_idx: int, end: int) -> tuple[Tensor, Tensor]:
        """All columns of a layer that has tokens, at least `end`: `[B, heads, capacity, head size]` each."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, _RaggedLayer) and layer.keys is not None and layer.values is not None
        layer.keys, layer.values = _reserved(layer.keys, end), _reserved(layer.values, end)
        return layer.keys, layer.values

    def write_run(self, key_states: Tensor, value_states: Tensor, layer_idx: int, row: int, start: int) -> None:
        """Write `[heads, T, head size]` after the first `start` tokens of one row."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())  # pyright: ignore[reportOptionalCall]
        layer = self.layers[layer_idx]
        assert isinstance(layer, _RaggedLayer)
        layer.write_run(key_states, value_states, row, start)

    def move(self, columns: Sequence[Sequence[int]]) -> None:
        """Put some tokens that the latest call wrote, in this order, before all others that it wrote.

        Args:
            columns: of the call, for each row.
        """
        for row, (length, chosen) in enumerate(zip(self.lengths, columns, strict=True)):
            if list(chosen) == list(range(len(chosen))):
                continue
            for layer in self.layers:
                assert isinstance(layer, _RaggedLayer)
                layer.move(row, length, chosen)

    def crop(self, tokens_to_remove: int) -> None:
        """Does nothing: tokens that are not kept are overwritten."""

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put these in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self._columns = None
        index = torch.tensor(rows)
        for layer in self.layers:
            assert isinstance(layer, _RaggedLayer)
            layer.select(index)

    def columns(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """`[B, T]`, the columns of the next T tokens of each row; None if they are the same in all rows."""
        if len(set(self.lengths)) == 1:
            return None
        if self._columns is None or self._columns.shape[1] != num_tokens:
            offsets = torch.arange(num_tokens, device=device)
            self._columns = torch.tensor(self.lengths, device=device).unsqueeze(1) + offsets
        return self._columns


class HasCapacity(Protocol):
    """Attributes: the initial number of columns."""

    capacity: int


AnyCache = TypeVar("AnyCache", bound=HasCapacity)


class PreallocatedLayer(CacheLayerMixin, Generic[AnyCache]):
    """One layer's keys and values, `[B, heads, capacity, head size]`; zeros where nothing was written."""

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


class _RaggedLayer(PreallocatedLayer["RaggedCache"]):
    """One layer's keys and values of a `RaggedCache`."""

    is_croppable = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, heads, T, head size]` after each row; returns all columns up to the end of the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_tokens = key_states.shape[2]
        end = max(self._cache.lengths) + num_tokens
        self.keys = self._written(self.keys, key_states, end)
        self.values = self._written(self.values, value_states, end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def write_run(self, key_states: Tensor, value_states: Tensor, row: int, start: int) -> None:
        """See `RaggedCache.write_run`."""
        if not self.is_initialized:
            shape = (len(self._cache.lengths), *key_states.shape)
            self.lazy_initialization(key_states.expand(shape), value_states.expand(shape))
        assert self.keys is not None and self.values is not None
        end = start + key_states.shape[1]
        self.keys, self.values = _reserved(self.keys, end), _reserved(self.values, end)
        self.keys[row, :, start:end] = key_states
        self.values[row, :, start:end] = value_states

    def move(self, row: int, length: int, columns: Sequence[int]) -> None:
        """See `RaggedCache.move`."""
        for store in (self.keys, self.values):
            assert store is not None
            index = torch.tensor(columns, device=store.device) + length
            store[row, :, length : length + len(columns)] = store[row].index_select(1, index)

    def _written(self, store: Tensor | None, states: Tensor, end: int) -> Tensor:
        assert store is not None
        store = _reserved(store, end)
        columns = self._cache.columns(states.shape[2], states.device)
        if columns is None:
            store[:, :, end - states.shape[2] : end] = states
        else:
            rows = torch.arange(len(store), device=store.device).unsqueeze(1)
            store[rows, :, columns] = states.transpose(1, 2)
        return store

    def select(self, rows: Tensor) -> None:
        """See `RaggedCache.select`."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        return max(self._cache.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self._cache.lengths) + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _reserved(store: Tensor, end: int) -> Tensor:
    """`[B, heads, columns, head size]` with at least `end` columns; more than needed, so that it grows rarely."""
    if end <= store.shape[2]:
        return store
    num_new = -(-max(end, 2 * store.shape[2]) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE - store.shape[2]
    return torch.cat([store, store.new_zeros(*store.shape[:2], num_new, store.shape[3])], dim=2)
