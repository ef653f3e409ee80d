"""Attention of windows over a shared context and over themselves, without scores between different windows.

A dense mask over all slots of a row would waste most of its scores: with N windows of J slots behind S context tokens,
N J (S + N J) of them instead of N J (S + J). Here the scores of a row are made, used and forgotten, and made again in
the backward pass, so that none of them live through it.

Tensor sizes: B rows, H key-value heads, N windows, Q queries of a window (its J places for each of the query heads that
share a key-value head), S context tokens, K keys of a window's own, D and E the sizes of keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """See `block_attention`. Rows are gone through one by one: the scores of one stay in the processor's cache."""

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
        scores, weights = _room_for_scores(query, sees), _room_for_scores(query, sees)
        for row in range(query.shape[0]):
            _attention_weights(query[row], context_keys[row], own_keys[row], sees[row], scale, scores, weights)
            of_context = weights[..., :size] @ _wide(context_values[row])
            of_own = _by_window(weights[..., size:], own_values[row]) @ _wide(own_values[row])
            attended[row] = of_own.add_(of_context.view_as(of_own))
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_attended: Tensor) -> tuple[Tensor | None, ...]:
        query, context_keys, context_values, own_keys, own_values, sees = ctx.saved_tensors
        scale, size = ctx.scale, context_keys.shape[2]
        grads = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(ctx.saved_tensors[:5], ctx.needs_input_grad, strict=False)
        ]
        of_query, of_context_keys, of_context_values, of_own_keys, of_own_values = grads
        slopes, weights = _room_for_scores(query, sees), _room_for_scores(query, sees)
        for row in range(query.shape[0]):
            _attention_weights(query[row], context_keys[row], own_keys[row], sees[row], scale, slopes, weights)
            grad = _wide(grad_attended[row])
            if of_context_values is not None:
                of_context_values[row] = weights[..., :size].transpose(1, 2) @ grad.flatten(1, 2)
            if of_own_values is not None:
                of_own_values[row] = _by_window(weights[..., size:], grad).transpose(2, 3) @ grad
            # d score = weight (d weight - sum of weight times d weight)
            _products(grad, context_values[row], own_values[row], slopes)
            torch._softmax_backward_data(slopes, weights, -1, weights.dtype, grad_input=slopes)  # pyright: ignore[reportPrivateImportUsage]
            to_context, to_own = slopes.mul_(scale)[..., :size], _by_window(slopes[..., size:], grad)
            if of_query is not None:
                through_own = to_own @ _wide(own_keys[row])
                of_query[row] = through_own.add_((to_context @ _wide(context_keys[row])).view_as(through_own))
            if of_context_keys is not None:
                of_context_keys[row] = to_context.transpose(1, 2) @ _wide(query[row]).flatten(1, 2)
            if of_own_keys is not None:
                of_own_keys[row] = to_own.transpose(2, 3) @ _wide(query[row])
        return (*grads, None, None)


def _room_for_scores(query: Tensor, sees: Tensor) -> Tensor:
    """`[H, N * Q, S + K]`, for one row, in float32 or better."""
    _, num_heads, num_windows, num_queries, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(num_heads, num_windows * num_queries, sees.shape[-1], dtype=dtype)


def _attention_weights(
    query: Tensor, context_keys: Tensor, own_keys: Tensor, sees: Tensor, scale: float, scores: Tensor, weights: Tensor
) -> None:
    """Fill in the attention weights of one row; `scores` is room for them on the way."""
    _products(_wide(query) * scale, context_keys, own_keys, scores)
    scores.view(*query.shape[:-1], -1).masked_fill_(~sees, -math.inf)
    torch.softmax(scores, -1, out=weights)


def _products(rows: Tensor, context: Tensor, own: Tensor, products: Tensor) -> None:
    """Inner products of `[H, N, Q, D]` with `[H, S, D]`, and within windows with `[H, N, K, D]`: `[H, N Q, S + K]`."""
    size = context.shape[1]
    torch.bmm(rows.flatten(1, 2), _wide(context).transpose(1, 2), out=products[..., :size])
    products[..., size:] = (rows @ _wide(own).transpose(2, 3)).flatten(1, 2)


def _by_window(entries: Tensor, like: Tensor) -> Tensor:
    """`[H, N * Q, K]` as `[H, N, Q, K]`; `like` is `[H, N, ...]`.

    Contiguous: many small products of strided matrices are made one by one.
    """
    return entries.unflatten(1, (like.shape[1], -1)).contiguous()


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
