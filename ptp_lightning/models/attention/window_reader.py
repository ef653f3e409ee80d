"""Reads windows behind a context, a few places of every window in a call.

Layers that hand keyword arguments on to their attention get `window_keys` and attend block by block; the few others
see all windows of a row through one dense mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.caches import same_tensors
from ptp_lightning.models.attention.dispatch import JointKeys, WindowKeys
from ptp_lightning.models.attention.masks import context_mask, sees_context, slot_mask

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache


class Run(Protocol):
    """Layers that read input embeddings `[B, T, H]`; the others as in `PredictorNetwork.decode`."""

    def __call__(
        self, embeddings: Tensor, position_ids: Tensor, mask: Tensor, cache: Cache | None, **more: Any
    ) -> Tensor: ...


class WindowReader:
    """Reads places of windows.

    Args:
        batch: the packed rows that the windows belong to.
        cache: keys and values of the context; stays as it is.
        in_blocks: whether the layers hand `window_keys` on to `attend_windows`.
        keeps: whether a call sees the places of the calls before it; else each call starts at the first place.
    """

    def __init__(self, batch: PackedBatch, cache: DynamicCache, *, in_blocks: bool, keeps: bool = False) -> None:
        self._batch = batch
        self._positions = batch.window_positions.unsqueeze(-1)
        self._keeps = keeps
        self._keys = WindowKeys(cache, keeps) if in_blocks else None
        self._cache = cache
        self._sees = sees_context(batch.document_ids, batch.window_starts).unsqueeze(1) if in_blocks else None
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
        positions = (self._positions + offsets).flatten(1)
        rows = embeddings.flatten(1, 2)
        if self._keys is not None:
            assert self._sees is not None
            hidden = run(rows, positions, self._sees, None, window_keys=self._keys)
        else:
            cache = same_tensors(self._cache)
            hidden = run(rows, positions, _dense_mask(self._batch, [*self._calls, places]), cache)
            if self._keeps:
                self._cache = cache
        if self._keeps:
            self._read += places
            self._calls.append(places)
        return hidden.unflatten(1, (num_windows, places))


def read_jointly(batch: PackedBatch, run: Run, tokens: Tensor, embeddings: Tensor, in_blocks: bool) -> Tensor:
    """The context and windows behind it in one call, so that gradients reach both.

    Args:
        batch: the packed rows and the starts of their windows.
        run: the layers.
        tokens: `[B, S, H]`, input embeddings of the context.
        embeddings: `[B, N, J, H]`, of the windows' first J places.
        in_blocks: see `WindowReader`.

    Returns:
        Last hidden states of the windows, `[B, N, J, H]`.
    """
    num_windows, length = embeddings.shape[1:3]
    offsets = torch.arange(length, device=embeddings.device)
    positions = torch.cat([batch.position_ids, (batch.window_positions.unsqueeze(-1) + offsets).flatten(1)], dim=1)
    rows = torch.cat([tokens, embeddings.flatten(1, 2).to(tokens.dtype)], dim=1)
    of_context = context_mask(batch.document_ids)
    if in_blocks:
        mask = sees_context(batch.document_ids, batch.window_starts).unsqueeze(1)
        hidden = run(rows, positions, mask, None, window_keys=JointKeys(of_context))
    else:
        no_slots = torch.nn.functional.pad(of_context, (0, num_windows * length))  # context tokens see no slot
        hidden = run(rows, positions, torch.cat([no_slots, _dense_mask(batch, [length])], dim=2), None)
    return hidden[:, tokens.shape[1] :].unflatten(1, (num_windows, length))


def _dense_mask(batch: PackedBatch, calls: Sequence[int]) -> Tensor:
    """`[B, 1, N * J, S + N * K]` of the last of some calls that read so many places of each window.

    What a cache holds of windows lies call by call, window by window in each.
    """
    device, num_windows = batch.window_starts.device, batch.num_windows
    windows, offsets, begin = [], [], 0
    for length in calls:
        windows.append(torch.arange(num_windows, device=device).repeat_interleave(length))
        offsets.append((begin + torch.arange(length, device=device)).repeat(num_windows))
        begin += length
    return slot_mask(
        batch.document_ids,
        batch.window_starts,
        query_window=windows[-1],
        query_offset=offsets[-1],
        key_window=torch.cat(windows),
        key_offset=torch.cat(offsets),
    )
