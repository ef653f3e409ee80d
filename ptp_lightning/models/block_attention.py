"""Attention of windows over a shared context and over themselves, without scores between different windows.

A dense mask over all slots of a row would waste most of its scores: with N windows of J slots behind S context tokens,
N J (S + N J) of them instead of N J (S + J). Here the scores of a row are made, used and forgotten, and made again in
the backward pass, so that none of them live through it.

Tensor sizes: B rows, H key-value heads, N windows, Q queries of a window (its J places for each of the query heads that
share a key-value head), S context tokens, K keys of a window's own, D and E the sizes of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUP_SCORES = 2**20
"""Scores that exist at the same time, unless a row alone has more."""


def block_attention(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    sees: Tensor,
    scale: float,
) -> Tensor:
    """Softmax attention; its arithmetic is in float32 or better.

    Args:
        query: `[B, H, N, Q, D]`.
        context: keys `[B, H, S, D]` and values `[B, H, S, E]`.
        own: keys `[B, H, N, K, D]` and values `[B, H, N, K, E]` of the windows.
        sees: `[B, N, Q, S + K]` bool, true where a query may see a key; every query sees one at least.
        scale: of the scores.

    Returns:
        `[B, H, N, Q, E]`, with gradients for all but `sees`.
    """
    attended = _BlockAttention.apply(query, *context, *own, sees, scale)
    assert isinstance(attended, Tensor)
    return attended


class _BlockAttention(torch.autograd.Function):
    """See `block_attention`. A few rows are gone through at a time: their scores stay in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        sees: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, context_keys, context_values, own_keys, own_values, sees)
        ctx.scale = scale
        attended = query.new_empty(*query.shape[:-1], own_values.shape[-1])
        size = context_keys.shape[2]
        for rows, scores, weights in _groups_of_rows(query, sees):
            _attention_weights(query[rows], context_keys[rows], own_keys[rows], sees[rows], scale, scores, weights)
            of_context = weights[..., :size] @ _wide(context_values[rows])
            of_own = _by_window(weights[..., size:], own_values) @ _wide(own_values[rows])
            attended[rows] = of_own.add_(of_context.view_as(of_own))
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_attended: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, sees = ctx.saved_tensors
        query, context_keys, context_values, own_keys, own_values = inputs
        scale, size = ctx.scale, context_keys.shape[2]
        grads = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        of_query, of_context_keys, of_context_values, of_own_keys, of_own_values = grads
        for rows, slopes, weights in _groups_of_rows(query, sees):
            _attention_weights(query[rows], context_keys[rows], own_keys[rows], sees[rows], scale, slopes, weights)
            grad = _wide(grad_attended[rows])
            if of_context_values is not None:
                of_context_values[rows] = weights[..., :size].transpose(2, 3) @ grad.flatten(2, 3)
            if of_own_values is not None:
                of_own_values[rows] = _by_window(weights[..., size:], own_values).transpose(3, 4) @ grad
            # d score = weight (d weight - sum of weight times d weight)
            _products(grad, context_values[rows], own_values[rows], slopes)
            torch._softmax_backward_data(slopes, weights, -1, weights.dtype, grad_input=slopes)  # pyright: ignore[reportPrivateImportUsage]
            to_context, to_own = slopes.mul_(scale)[..., :size], _by_window(slopes[..., size:], own_values)
            if of_query is not None:
                through_own = to_own @ _wide(own_keys[rows])
                of_query[rows] = through_own.add_((to_context @ _wide(context_keys[rows])).view_as(through_own))
            if of_context_keys is not None:
                of_context_keys[rows] = to_context.transpose(2, 3) @ _wide(query[rows]).flatten(2, 3)
            if of_own_keys is not None:
                of_own_keys[rows] = to_own.transpose(3, 4) @ _wide(query[rows])
        return (*grads, None, None)


def _groups_of_rows(query: Tensor, sees: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, and room for two times their scores `[R, H, N * Q, S + K]`, in float32 or better."""
    num_rows, num_heads, num_windows, num_queries, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = num_heads, num_windows * num_queries, sees.shape[-1]
    size = max(GROUP_SCORES // math.prod(shape), 1)
    room = [query.new_empty(min(size, num_rows), *shape, dtype=dtype) for _ in range(2)]
    for begin in range(0, num_rows, size):
        rows = slice(begin, min(begin + size, num_rows))
        one, other = (scores[: rows.stop - begin] for scores in room)
        yield rows, one, other


def _attention_weights(
    query: Tensor, context_keys: Tensor, own_keys: Tensor, sees: Tensor, scale: float, scores: Tensor, weights: Tensor
) -> None:
    """Fill in the attention weights of some rows; `scores` is room for them on the way."""
    _products(_wide(query) * scale, context_keys, own_keys, scores)
    scores.view(*query.shape[:-1], -1).masked_fill_(~sees.unsqueeze(1), -math.inf)
    torch.softmax(scores, -1, out=weights)


def _products(queries: Tensor, context: Tensor, own: Tensor, products: Tensor) -> None:
    """Inner products of `[R, H, N, Q, D]` with `[R, H, S, D]`, and in windows with `[R, H, N, K, D]`."""
    size = context.shape[2]
    of_context = products.flatten(0, 1)[..., :size]
    torch.bmm(queries.flatten(2, 3).flatten(0, 1), _wide(context).flatten(0, 1).transpose(1, 2), out=of_context)
    products[..., size:] = (queries @ _wide(own).transpose(3, 4)).flatten(2, 3)


def _by_window(entries: Tensor, own: Tensor) -> Tensor:
    """`[R, H, N * Q, K]` as `[R, H, N, Q, K]`, with N of `own`.

    Contiguous: many small products of strided matrices are made one by one.
    """
    return entries.unflatten(2, (own.shape[2], -1)).contiguous()


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
