"""FlexAttention for windows: for 16-bit numbers on a GPU, where it is faster than blocks in float32.

Scores between different windows fall into blocks that the kernel skips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.blocks import Blocks, keys_and_values
from ptp_lightning.models.attention.interface import RunLayers, window_position_ids
from ptp_lightning.models.attention.masks import sees_context

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

MIN_HEAD_SIZE = 16  # of torch's kernels


class Flex(Blocks):
    """FlexAttention where all positions of a window are read at once; see `WindowAttention`.

    Incremental and joint reading stay with blocks: the kernel is compiled for each shape, and windows that grow by a
    position per call would be a new shape each time.
    """

    name: ClassVar[str] = "FlexAttention"

    def is_supported(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether blocks are, and the kernel is made for such numbers, on such a device, for heads of this size."""
        return (
            super().is_supported(model, device, dtype)
            and device.type == "cuda"
            and dtype in (torch.bfloat16, torch.float16)
            and _smallest_head_size(model) >= MIN_HEAD_SIZE
        )

    def read_windows(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache, embeddings: Tensor) -> Tensor:
        """See `WindowAttention.read_windows`."""
        num_windows, length = embeddings.shape[1:3]
        keys = FlexKeys(cache, sees_context(batch.document_ids, batch.window_starts), length)
        hidden = run(embeddings.flatten(1, 2), window_position_ids(batch, 0, length), None, None, window_keys=keys)
        return hidden.unflatten(1, (num_windows, length))


class FlexKeys:
    """`WindowKeys` of a call that reads windows after a context; all layers share one block mask.

    Args:
        context: keys and values of the context.
        visible_context: `[B, N, S]` bool, the context tokens that each window sees.
        window_length: J, positions of each window.
    """

    def __init__(self, context: DynamicCache, visible_context: Tensor, window_length: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        num_rows, num_windows, size = visible_context.shape

        def is_visible(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            window, own = query // window_length, key - size
            in_context = (key < size) & visible_context[row, window, key.clamp_max(size - 1)]
            in_own_window = (key >= size) & (own // window_length == window)
            return in_context | (in_own_window & (own % window_length <= query % window_length))

        num_queries = num_windows * window_length
        self._context = context
        self._mask = create_block_mask(
            is_visible, num_rows, None, num_queries, size + num_queries, device=str(visible_context.device)
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `WindowKeys.attend`."""
        context_keys, context_values = keys_and_values(self._context, layer)
        keys, values = torch.cat([context_keys, key], dim=2), torch.cat([context_values, value], dim=2)
        attended = _kernel(query.device.type)(
            query, keys, values, block_mask=self._mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return attended.transpose(1, 2)


def _smallest_head_size(model: PreTrainedModel) -> int:
    """Of the model's heads and of those of a refiner with the model's width and number of heads."""
    config: Any = model.config
    usual: int = config.hidden_size // config.num_attention_heads
    return min(usual, getattr(config, "head_dim", None) or usual)


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation, as on a CPU, it computes all scores and has no backward pass.
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
