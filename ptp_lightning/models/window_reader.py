"""Reads windows behind a context, a few places of every window in a call.

Layers that hand keyword arguments on to their attention get `window_keys` and attend block by block; the few others
see all windows of a row through one dense mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ptp_lightning.models.window_attention import sees_context, slot_mask
from ptp_lightning.models.window_keys import WindowKeys

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache
    from transformers.cache_utils import DynamicLayer


class Run(Protocol):
    """Layers that read input embeddings `[B, T, H]`; the others as in `ParallelTokenPredictor.decode`."""

    def __call__(
        self, embeddings: Tensor, position_ids: Tensor, mask: Tensor, cache: Cache | None, **more: Any
    ) -> Tensor: ...


class WindowPlaces(NamedTuple):
    """Where the windows of packed rows stand.

    Attributes:
        document_ids: `[B, S]`.
        window_starts: `[B, N]`, row index of each window's first token.
        positions: `[B, N]`, position id of each window's first token.
    """

    document_ids: Tensor
    window_starts: Tensor
    positions: Tensor


class WindowReader:
    """Reads places of windows.

    Args:
        places: of the windows.
        cache: keys and values of the context; stays as it is.
        in_blocks: whether the layers hand `window_keys` on to `attend_windows`.
        keeps: whether a call sees the places of the calls before it; else each call starts at the first place.
    """

    def __init__(self, places: WindowPlaces, cache: DynamicCache, *, in_blocks: bool, keeps: bool = False) -> None:
        self._places = places
        self._keeps = keeps
        self._keys = WindowKeys(cache, keeps) if in_blocks else None
        self._cache = cache
        self._sees = sees_context(places.document_ids, places.window_starts).unsqueeze(1) if in_blocks else None
        self._read = 0  # places of each window that are kept
        self._calls: list[int] = []  # and how many came at a time

    def read(self, run: Run, embeddings: Tensor) -> Tensor:
        """The next J places of each window.

        Args:
            run: the layers.
            embeddings: `[B, N, J, H]`.

        Returns:
            Last hidden states `[B, N, J, H]`.
        """
        num_windows, places = embeddings.shape[1:3]
        offsets = self._read + torch.arange(places, device=embeddings.device)
        positions = (self._places.positions.unsqueeze(-1) + offsets).flatten(1)
        rows = embeddings.flatten(1, 2)
        if self._keys is not None:
            assert self._sees is not None
            hidden = run(rows, positions, self._sees, None, window_keys=self._keys)
        else:
            cache = same_keys(self._cache)
            hidden = run(rows, positions, self._dense_mask(num_windows, places), cache)
            if self._keeps:
                self._cache = cache
        if self._keeps:
            self._read += places
            self._calls.append(places)
        return hidden.unflatten(1, (num_windows, places))

    def _dense_mask(self, num_windows: int, places: int) -> Tensor:
        """`[B, 1, N * J, S + N * K]`: what the cache holds of windows lies call by call, window by window in each."""
        device = self._places.positions.device
        windows, offsets, begin = [], [], 0
        for length in [*self._calls, places]:
            windows.append(torch.arange(num_windows, device=device).repeat_interleave(length))
            offsets.append((begin + torch.arange(length, device=device)).repeat(num_windows))
            begin += length
        return slot_mask(
            self._places.document_ids,
            self._places.window_starts,
            query_window=windows[-1],
            query_offset=offsets[-1],
            key_window=torch.cat(windows),
            key_offset=torch.cat(offsets),
        )


def same_keys(cache: DynamicCache) -> DynamicCache:
    """A cache of the same tensors, which can grow while this one stays as it is."""
    from transformers import DynamicCache

    copy = DynamicCache()
    for index, layer in enumerate(cast("list[DynamicLayer]", cache.layers)):
        assert layer.keys is not None and layer.values is not None, "the context has been read"
        copy.update(layer.keys[..., :0, :], layer.values[..., :0, :], index)
        own = cast("DynamicLayer", copy.layers[index])
        own.keys, own.values = layer.keys, layer.values
    return copy
