"""Dense attention: all windows of a row under one mask, for models whose attention function cannot be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.caches import same_tensors
from ptp_lightning.models.attention.interface import IncrementalReader, RunLayers, window_position_ids
from ptp_lightning.models.attention.masks import context_mask, slot_mask

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class Dense:
    """Masked attention of every position to every key; see `WindowAttention`.

    It runs any model, but memory and time grow with the square of all window positions of a row.
    """

    name: ClassVar[str] = "one dense mask"

    def is_supported(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
        """Always true."""
        return True

    def read_windows(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache, embeddings: Tensor) -> Tensor:
        """See `WindowAttention.read_windows`."""
        return _DenseReader(run, batch, cache).read(embeddings)

    def incremental_reader(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache) -> IncrementalReader:
        """See `WindowAttention.incremental_reader`."""
        return _DenseReader(run, batch, cache)

    def read_jointly(self, run: RunLayers, batch: PackedBatch, context: Tensor, embeddings: Tensor) -> Tensor:
        """See `WindowAttention.read_jointly`."""
        num_windows, length = embeddings.shape[1:3]
        all_embeddings = torch.cat([context, embeddings.flatten(1, 2).to(context.dtype)], dim=1)
        all_position_ids = torch.cat([batch.position_ids, window_position_ids(batch, 0, length)], dim=1)
        # context tokens see no window
        of_context = torch.nn.functional.pad(context_mask(batch.document_ids), (0, num_windows * length))
        mask = torch.cat([of_context, _mask_of_last_call(batch, [length])], dim=2)
        hidden = run(all_embeddings, all_position_ids, mask, None)
        return hidden[:, context.shape[1] :].unflatten(1, (num_windows, length))


class _DenseReader:
    """See `IncrementalReader`."""

    def __init__(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache) -> None:
        self._run = run
        self._batch = batch
        self._cache = same_tensors(cache)
        self._lengths: list[int] = []  # positions of each window read by each call

    def read(self, embeddings: Tensor) -> Tensor:
        """See `IncrementalReader.read`."""
        num_windows, length = embeddings.shape[1:3]
        position_ids = window_position_ids(self._batch, sum(self._lengths), length)
        self._lengths.append(length)
        mask = _mask_of_last_call(self._batch, self._lengths)
        hidden = self._run(embeddings.flatten(1, 2), position_ids, mask, self._cache)
        return hidden.unflatten(1, (num_windows, length))


def _mask_of_last_call(batch: PackedBatch, lengths: Sequence[int]) -> Tensor:
    """The mask `[B, 1, N * J, S + N * K]` of the last of several calls that read `lengths` positions of each window.

    The cache holds the context, then call after call, and the windows one after the other within a call.
    """
    num_windows, device = batch.window_starts.shape[1], batch.window_starts.device
    windows, offsets, num_read = [], [], 0
    for length in lengths:
        windows.append(torch.arange(num_windows, device=device).repeat_interleave(length))
        offsets.append((num_read + torch.arange(length, device=device)).repeat(num_windows))
        num_read += length
    return slot_mask(
        batch.document_ids,
        batch.window_starts,
        query_window=windows[-1],
        query_offset=offsets[-1],
        key_window=torch.cat(windows),
        key_offset=torch.cat(offsets),
    )
