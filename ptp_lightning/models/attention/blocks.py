"""Attention of windows over a shared context and over themselves, without scores between different windows.

A dense mask over all slots of a row would waste most of its scores: with N windows of J slots behind S context tokens,
N J (S + N J) of them instead of N J (S + J). Here the scores of a group of windows are made, used and forgotten, and
made again in the backward pass, so that none of them live through it.

Tensor sizes: B rows, H key-value heads, N windows, Q queries of a window (its J places for each of the query heads that
share a key-value head), S context tokens, K keys of a window's own, D and E the sizes of keys and values. A group has R
rows, n windows and c context tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.models.attention.visible_keys import Group, VisibleKeys


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
        if own_values.shape[-1] == query.shape[-1]:
            attended = torch.empty_like(query)  # in the query's order, in which heads are put side by side again
        else:
            attended = query.new_empty(*query.shape[:-1], own_values.shape[-1])
        for part in _parts(query, context_keys, own_keys, visible, scale):
            to_context, to_own = part.split(part.weights)
            result = to_own @ _by_window(own_values, part.group)
            part.by_row(result).baddbmm_(to_context, _context(context_values, part.group))
            _fill_in(attended, part.group, result)
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
        for part in _parts(query, context_keys, own_keys, visible, scale):
            group, queries, keys, keys_of_context, weights, slopes = part
            grad = _by_window(grad_attended, group)
            to_context, to_own = part.split(weights)
            if of_context_values is not None:
                _add_to(of_context_values, group, to_context.transpose(1, 2) @ part.by_row(grad))
            if of_own_values is not None:
                _fill_in(of_own_values, group, to_own.transpose(1, 2) @ grad)
            # d score = weight (d weight - sum of weight times d weight)
            part.products(grad, _context(context_values, group), _by_window(own_values, group), slopes)
            torch._softmax_backward_data(slopes, weights, -1, weights.dtype, grad_input=slopes)  # pyright: ignore[reportPrivateImportUsage]
            to_context, to_own = part.split(slopes)
            if of_query is not None:
                of_queries = torch.empty_like(queries).baddbmm_(to_own, keys, beta=0, alpha=scale)
                part.by_row(of_queries).baddbmm_(to_context, keys_of_context, alpha=scale)
                _fill_in(of_query, group, of_queries)
            if of_context_keys is not None:
                _add_to(of_context_keys, group, (to_context.transpose(1, 2) @ part.by_row(queries)).mul_(scale))
            if of_own_keys is not None:
                _fill_in(of_own_keys, group, (to_own.transpose(1, 2) @ queries).mul_(scale))
        return (*grads, None, None)


class _Part(NamedTuple):
    """A group's, in float32 or better and contiguous.

    Attributes:
        group: which it is.
        queries: `[R * H * n, Q, D]`.
        keys: `[R * H * n, K, D]`, the windows' own.
        keys_of_context: `[R * H, c, D]`.
        weights: `[R * H, n * Q, c + K]`, of attention.
        room: for as many numbers.
    """

    group: Group
    queries: Tensor
    keys: Tensor
    keys_of_context: Tensor
    weights: Tensor
    room: Tensor

    def by_row(self, tensor: Tensor) -> Tensor:
        """`[R * H * n, Q, D]` as `[R * H, n * Q, D]`."""
        return tensor.view(*self.weights.shape[:2], -1)

    def split(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Those for the context, `[R * H, n * Q, c]`, and those for a window's own keys, `[R * H * n, Q, K]`.

        The latter contiguous: many small products of strided matrices are made one by one.
        """
        size = self.keys_of_context.shape[1]
        return entries[..., :size], entries[..., size:].reshape(*self.queries.shape[:2], -1)

    def products(
        self,
        queries: Tensor,
        context: Tensor,
        own: Tensor,
        result: Tensor,
        scale: float = 1.0,
        bias: Tensor | None = None,
    ) -> None:
        """Fill in inner products of queries with what is the context's and the window's; the latter plus a bias."""
        size, own = context.shape[1], own.transpose(1, 2)
        result[..., :size].baddbmm_(self.by_row(queries), context.transpose(1, 2), beta=0, alpha=scale)
        of_own = queries @ own if bias is None else torch.baddbmm(bias, queries, own, alpha=scale)
        result[..., size:] = self.by_row(of_own)


def _parts(
    query: Tensor, context_keys: Tensor, own_keys: Tensor, visible: VisibleKeys, scale: float
) -> Iterator[_Part]:
    """One after the other; their attention weights and room are where those of the part before were."""
    num_heads, num_queries, num_own = query.shape[1], query.shape[3], visible.own.shape[1]
    groups = visible.groups(num_heads)
    shapes = [
        (_length(rows) * num_heads, _length(windows) * num_queries, _length(columns) + num_own)
        for rows, windows, columns in groups
    ]
    dtype = torch.promote_types(query.dtype, torch.float32)
    most = max(map(math.prod, shapes), default=0)
    one, other = (query.new_empty(most, dtype=dtype) for _ in range(2))
    for group, shape in zip(groups, shapes, strict=True):
        scores, weights = (flat[: math.prod(shape)].view(shape) for flat in (one, other))
        queries, keys = _by_window(query, group), _by_window(own_keys, group)
        part = _Part(group, queries, keys, _context(context_keys, group), weights, scores)
        of_context, of_own = visible.biases(group, dtype)
        part.products(queries, part.keys_of_context, keys, scores, scale, of_own)
        num_rows, num_windows, size = of_context.shape
        by_window = scores.view(num_rows, num_heads, num_windows, num_queries, -1)
        by_window[..., :size].add_(of_context[:, None, :, None])
        torch.softmax(scores, -1, out=weights)
        yield part


def _by_window(tensor: Tensor, group: Group) -> Tensor:
    """Of `[B, H, N, Q or K, D]` those of a group: `[R * H * n, Q or K, D]`, contiguous."""
    return _wide(tensor[group.rows, :, group.windows]).flatten(0, 2).contiguous()


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


def _length(part: slice) -> int:
    return part.stop - part.start


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
