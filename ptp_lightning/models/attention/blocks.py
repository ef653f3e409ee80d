"""Attention by blocks: each window attends to its context and to itself, and no scores between windows are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.block_attention import VisibleKeys, block_attention
from ptp_lightning.models.attention.eager_attention import needs_eager_attention
from ptp_lightning.models.attention.interface import IncrementalReader, RunLayers, window_position_ids
from ptp_lightning.models.attention.masks import context_mask, sees_context
from ptp_lightning.models.attention.sliding_window import has_sliding_window

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer


class Blocks:
    """Attention of window after window, in float32 or better, by `block_attention`; see `WindowAttention`."""

    name: ClassVar[str] = "blocks"

    def is_supported(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the model passes keyword arguments on to its attention function, which finds the keys there.

        Not with sliding windows, where the context that is visible differs between the positions of a window, and not
        with eager attention, which gets a mask.
        """
        if needs_eager_attention(model) or has_sliding_window(model.config):
            return False
        return model._supports_attention_backend

    def read_windows(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache, embeddings: Tensor) -> Tensor:
        """See `WindowAttention.read_windows`."""
        num_windows, length = embeddings.shape[1:3]
        keys = BlockKeys(cache, _visible_context(batch))
        hidden = run(embeddings.flatten(1, 2), window_position_ids(batch, 0, length), None, None, window_keys=keys)
        return hidden.unflatten(1, (num_windows, length))

    def incremental_reader(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache) -> IncrementalReader:
        """See `WindowAttention.incremental_reader`."""
        return _BlockReader(run, batch, cache)

    def read_jointly(self, run: RunLayers, batch: PackedBatch, context: Tensor, embeddings: Tensor) -> Tensor:
        """See `WindowAttention.read_jointly`."""
        num_windows, length = embeddings.shape[1:3]
        all_embeddings = torch.cat([context, embeddings.flatten(1, 2).to(context.dtype)], dim=1)
        all_position_ids = torch.cat([batch.position_ids, window_position_ids(batch, 0, length)], dim=1)
        keys = _JointKeys(context_mask(batch.document_ids), _visible_context(batch))
        hidden = run(all_embeddings, all_position_ids, None, None, window_keys=keys)
        return hidden[:, context.shape[1] :].unflatten(1, (num_windows, length))


class _BlockReader:
    """See `IncrementalReader`."""

    def __init__(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache) -> None:
        self._run = run
        self._batch = batch
        self._keys = _GrowingBlockKeys(cache, _visible_context(batch))
        self._num_read = 0

    def read(self, embeddings: Tensor) -> Tensor:
        """See `IncrementalReader.read`."""
        num_windows, length = embeddings.shape[1:3]
        position_ids = window_position_ids(self._batch, self._num_read, length)
        self._num_read += length
        hidden = self._run(embeddings.flatten(1, 2), position_ids, None, None, window_keys=self._keys)
        return hidden.unflatten(1, (num_windows, length))


class _BlockAttention:
    """`block_attention` for queries, keys and values as a model makes them.

    Args:
        visible_context: `[B, N, S]` bool, the context tokens that each window sees.
    """

    def __init__(self, visible_context: Tensor) -> None:
        self._visible_context = visible_context
        self._visible: VisibleKeys | None = None

    def __call__(
        self, query: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Attention of a layer.

        Args:
            query: `[B, heads, N * J, D]`, of the last J of K positions of each window.
            context: keys `[B, key-value heads, S, D]` and values `[B, key-value heads, S, E]`.
            own: keys `[B, key-value heads, N, K, D]` and values `[B, key-value heads, N, K, E]` of the windows.
            scale: of the scores.

        Returns:
            `[B, N * J, heads, E]`.
        """
        num_rows, num_heads, num_queries, size = query.shape
        num_windows = self._visible_context.shape[1]
        shared, length = num_heads // own[0].shape[1], num_queries // num_windows  # query heads of a key-value head
        # [B, key-value heads, N, shared heads * J, D]
        blocks = query.view(num_rows, -1, shared, num_windows, length, size).transpose(2, 3).flatten(3, 4)
        visible = self._visible_keys(shared, length, own[0].shape[3])
        attended = block_attention(blocks, context, own, visible, scale)
        attended = attended.unflatten(3, (shared, length))  # [B, key-value heads, N, shared, J, E]
        return attended.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)

    def _visible_keys(self, shared: int, length: int, num_own: int) -> VisibleKeys:
        """The same object for all layers of a call, so that windows are divided into groups once."""
        if self._visible is None or self._visible.own.shape != (shared * length, num_own):
            causal = torch.ones(length, num_own, dtype=torch.bool, device=self._visible_context.device)
            self._visible = VisibleKeys(self._visible_context, causal.tril(num_own - length).repeat(shared, 1))
        return self._visible


class BlockKeys:
    """`WindowKeys` of a call that reads windows after a context.

    Args:
        context: keys and values of the context.
        visible_context: `[B, N, S]` bool, the context tokens that each window sees.
    """

    def __init__(self, context: DynamicCache, visible_context: Tensor) -> None:
        self._context = context
        self._num_windows = visible_context.shape[1]
        self._attend = _BlockAttention(visible_context)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `WindowKeys.attend`."""
        own = self._own_keys(layer, *_by_window(self._num_windows, key, value))
        return self._attend(query, keys_and_values(self._context, layer), own, scale)

    def _own_keys(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, key-value heads, N, K, ...]` of all positions read so far; here, of this call."""
        return keys, values


class _GrowingBlockKeys(BlockKeys):
    """`WindowKeys` that keep the windows' own keys and values for the next call."""

    def __init__(self, context: DynamicCache, visible_context: Tensor) -> None:
        super().__init__(context, visible_context)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def _own_keys(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            earlier_keys, earlier_values = self._kept[layer]
            keys, values = torch.cat([earlier_keys, keys], dim=3), torch.cat([earlier_values, values], dim=3)
        self._kept[layer] = keys, values
        return keys, values


class _JointKeys:
    """`WindowKeys` of a call that reads S context tokens, then J positions of each window.

    Args:
        mask: `[B, 1, S, S]` bool, of the context tokens.
        visible_context: `[B, N, S]` bool, the context tokens that each window sees.
    """

    def __init__(self, mask: Tensor, visible_context: Tensor) -> None:
        self._mask = mask
        self._num_windows, self._context_length = visible_context.shape[1:]
        self._attend = _BlockAttention(visible_context)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `WindowKeys.attend`."""
        sizes = [self._context_length, query.shape[2] - self._context_length]
        (q, k, v), (queries, keys, values) = zip(
            *(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True
        )
        of_windows = self._attend(queries, (k, v), _by_window(self._num_windows, keys, values), scale)
        if (shared := q.shape[1] // k.shape[1]) > 1:  # with a mask, fused kernels need one key head per query head
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        of_context = scaled_dot_product_attention(q, k, v, self._mask, scale=scale)
        return torch.cat([of_context.transpose(1, 2), of_windows], dim=1)


def keys_and_values(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, key-value heads, S, ...]` of a context that has been read."""
    cached = cast("DynamicLayer", cache.layers[layer])
    assert cached.keys is not None and cached.values is not None, "the context has been read"
    return cached.keys, cached.values


def _visible_context(batch: PackedBatch) -> Tensor:
    return sees_context(batch.document_ids, batch.window_starts)


def _by_window(num_windows: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, key-value heads, N * J, ...]` as `[B, key-value heads, N, J, ...]`."""
    return key.unflatten(2, (num_windows, -1)), value.unflatten(2, (num_windows, -1))
