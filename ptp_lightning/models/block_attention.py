"""Attention of windows over a shared context and over themselves, without scores between different windows.

A dense mask over all slots of a row would waste most of its scores: with N windows of J slots behind S context tokens,
N J (S + N J) of them instead of N J (S + J). Here the scores of a group of windows are made, used and forgotten, and
made again in the backward pass, so that none of them live through it.

Tensor sizes: B rows, H key-value heads, N windows, Q queries of a window (its J places for each of the query heads that
share a key-value head), S context tokens, K keys of a window's own, D and E the sizes of keys and values. A group has R
rows, n windows and c context tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.models.visible_keys import Group, VisibleKeys


def block_attention(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    visible: VisibleKeys,
    scale: float,
) -> Tensor:
    """Softmax attention; its arithmetic is in float32 or better.

    Args:
        query: `[B, H, N, Q, D]`.
        context: keys `[B, H, S, D]` and values `[B, H, S, E]`.
        own: keys `[B, H, N, K, D]` and values `[B, H, N, K, E]` of the windows.
        visible: which of them a query sees.
        scale: of the scores.

    Returns:
        `[B, H, N, Q, E]`, with gradients for all tensors.
    """
    with torch.autocast(query.device.type, enabled=False):
        attended = _BlockAttention.apply(query, *context, *own, visible, scale)
    assert isinstance(attended, Tensor)
    return attended


class _BlockAttention(torch.autograd.Function):
    """See `block_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        visible: VisibleKeys,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, context_keys, context_values, own_keys, own_values)
        ctx.visible, ctx.scale = visible, scale
        attended = query.new_empty(*query.shape[:-1], own_values.shape[-1])
        for group, scores, weights in _groups(query, visible):
            queries, keys, size = _by_window(query, group), _by_window(own_keys, group), _num_columns(group)
            keys_of_context = _context(context_keys, group)
            _attention_weights(queries, keys_of_context, keys, visible, group, scale, scores, weights)
            result = _own(weights, size, queries) @ _by_window(own_values, group)
            _by_row(result, weights).baddbmm_(weights[..., :size], _context(context_values, group))
            _fill_in(attended, group, result)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_attended: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        query, context_keys, context_values, own_keys, own_values = inputs
        visible, scale = ctx.visible, ctx.scale
        # The context's are added up over groups.
        new = torch.empty_like, torch.zeros_like, torch.zeros_like, torch.empty_like, torch.empty_like
        grads = [
            like(tensor) if needed else None
            for like, tensor, needed in zip(new, inputs, ctx.needs_input_grad, strict=False)
        ]
        of_query, of_context_keys, of_context_values, of_own_keys, of_own_values = grads
        for group, slopes, weights in _groups(query, visible):
            queries, keys, size = _by_window(query, group), _by_window(own_keys, group), _num_columns(group)
            keys_of_context = _context(context_keys, group)
            _attention_weights(queries, keys_of_context, keys, visible, group, scale, slopes, weights)
            grad = _by_window(grad_attended, group)
            if of_context_values is not None:
                _add_to(of_context_values, group, weights[..., :size].transpose(1, 2) @ _by_row(grad, weights))
            if of_own_values is not None:
                _fill_in(of_own_values, group, _own(weights, size, queries).transpose(1, 2) @ grad)
            # d score = weight (d weight - sum of weight times d weight)
            _products(grad, _context(context_values, group), _by_window(own_values, group), slopes)
            torch._softmax_backward_data(slopes, weights, -1, weights.dtype, grad_input=slopes)  # pyright: ignore[reportPrivateImportUsage]
            to_context, to_own = slopes[..., :size], _own(slopes, size, queries)
            if of_query is not None:
                of_queries = torch.empty_like(queries).baddbmm_(to_own, keys, beta=0, alpha=scale)
                _by_row(of_queries, slopes).baddbmm_(to_context, keys_of_context, alpha=scale)
                _fill_in(of_query, group, of_queries)
            if of_context_keys is not None:
                _add_to(of_context_keys, group, (to_context.transpose(1, 2) @ _by_row(queries, slopes)).mul_(scale))
            if of_own_keys is not None:
                _fill_in(of_own_keys, group, (to_own.transpose(1, 2) @ queries).mul_(scale))
        return (*grads, None, None)


def _groups(query: Tensor, visible: VisibleKeys) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Groups, and room for two times their scores `[R * H, n * Q, c + K]`, in float32 or better."""
    num_heads, num_queries, num_own = query.shape[1], query.shape[3], visible.own.shape[1]
    groups = list(visible.groups(num_heads))
    shapes = [
        (_length(rows) * num_heads, _length(windows) * num_queries, _length(columns) + num_own)
        for rows, windows, columns in groups
    ]
    sizes = [first * second * third for first, second, third in shapes]
    dtype = torch.promote_types(query.dtype, torch.float32)
    room = [query.new_empty(max(sizes, default=0), dtype=dtype) for _ in range(2)]
    for group, shape, size in zip(groups, shapes, sizes, strict=True):
        one, other = (flat[:size].view(shape) for flat in room)
        yield group, one, other


def _attention_weights(
    queries: Tensor,
    context: Tensor,
    own: Tensor,
    visible: VisibleKeys,
    group: Group,
    scale: float,
    scores: Tensor,
    weights: Tensor,
) -> None:
    """Fill in the attention weights of a group; `scores` is room for them on the way."""
    of_context, of_own = visible.biases(group, scores.dtype)
    _products(queries, context, own, scores, scale, of_own)
    num_rows, num_windows, size = of_context.shape
    by_window = scores.view(num_rows, -1, num_windows, queries.shape[1], scores.shape[-1])
    by_window[..., :size].add_(of_context[:, None, :, None])
    torch.softmax(scores, -1, out=weights)


def _products(
    queries: Tensor, context: Tensor, own: Tensor, products: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> None:
    """Inner products of queries, by window, with keys of the context and of the window; the latter plus a bias."""
    size, keys = context.shape[1], own.transpose(1, 2)
    of_context = products[..., :size]
    of_context.baddbmm_(_by_row(queries, products), context.transpose(1, 2), beta=0, alpha=scale)
    of_own = queries @ keys if bias is None else torch.baddbmm(bias, queries, keys, alpha=scale)
    products[..., size:] = _by_row(of_own, products)


def _own(entries: Tensor, size: int, queries: Tensor) -> Tensor:
    """Entries for a window's own keys, behind those for `size` context tokens: `[R * H * n, Q, K]`.

    Contiguous: many small products of strided matrices are made one by one.
    """
    return entries[..., size:].reshape(queries.shape[0], queries.shape[1], -1)


def _by_window(tensor: Tensor, group: Group) -> Tensor:
    """Of `[B, H, N, Q or K, D]` those of a group: `[R * H * n, Q or K, D]`, contiguous."""
    return _wide(tensor[group.rows, :, group.windows]).flatten(0, 2).contiguous()


def _by_row(by_window: Tensor, scores: Tensor) -> Tensor:
    """`[R * H * n, Q, D]` as `[R * H, n * Q, D]`, the queries of scores."""
    return by_window.view(*scores.shape[:2], -1)


def _context(tensor: Tensor, group: Group) -> Tensor:
    """Of `[B, H, S, D]` those of a group: `[R * H, c, D]`."""
    return _wide(tensor[group.rows, :, group.columns]).flatten(0, 1)


def _fill_in(total: Tensor, group: Group, part: Tensor) -> None:
    """`[B, H, N, Q or K, D]` with what is by window."""
    own = total[group.rows, :, group.windows]
    own.copy_(part.view(own.shape))


def _add_to(total: Tensor, group: Group, part: Tensor) -> None:
    """`[B, H, S, D]` with what is of the context."""
    own = total[group.rows, :, group.columns]
    own.add_(part.view(own.shape))


def _num_columns(group: Group) -> int:
    return _length(group.columns)


def _length(part: slice) -> int:
    return part.stop - part.start


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
