"""Attention of windows by FlexAttention: for 16-bit numbers on a GPU, where plain matrix products would round scores.

Scores between different windows fall into blocks that the kernel leaves out. The kernel is compiled at its first call,
once for every shape; windows that grow call by call would be a new shape each time and are left to `block_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_HEAD_SIZE = 16  # of its kernels


def is_supported(query: Tensor) -> bool:
    """Whether this attention is the better one for such numbers on such a device.

    Not for tensors without memory, which are on no device: a plan counts what attention by blocks keeps, which is the
    same but for the keys and values of the context side by side with a window's own.
    """
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] >= LEAST_HEAD_SIZE
    )


class FlexWindows:
    """Attention of whole windows behind a context, with the block mask of all layers.

    Args:
        sees_context: `[B, N, S]` bool.
        places: J, of each window.
    """

    def __init__(self, sees_context: Tensor, places: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        num_rows, num_windows, size = sees_context.shape

        def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            window, own = query // places, key - size
            of_context = (key < size) & sees_context[row, window, key.clamp_max(size - 1)]
            of_own = (key >= size) & (own // places == window) & (own % places <= query % places)
            return of_context | of_own

        num_queries = num_windows * places
        self._mask = create_block_mask(
            sees, num_rows, None, num_queries, size + num_queries, device=str(sees_context.device)
        )

    def attend(self, query: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """Attention of a layer.

        Args:
            query: `[B, heads, N * J, D]`.
            context: keys and values `[B, key-value heads, S, D]`.
            own: keys and values `[B, key-value heads, N * J, D]`.
            scale: of the scores.

        Returns:
            `[B, N * J, heads, D]`.
        """
        keys, values = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
        attended = _kernel(query.device.type)(
            query, keys, values, block_mask=self._mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return attended.transpose(1, 2)


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation, as on a CPU, it computes all scores and has no backward pass.
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
