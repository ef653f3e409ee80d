"""Softmax attention of windows to a shared context and to themselves, without scores between different windows.

A dense mask over all windows of a row wastes most of its scores: with N windows of J positions after S context tokens,
N J (S + N J) are computed where N J (S + J) are needed. Here windows are divided into groups. The scores of a group are
computed, used and freed, and computed again in the backward pass, so that no score lives through the step.

Tensor sizes: B rows, H key-value heads, N windows, Q queries of a window (its J positions for each query head of a
key-value head), S context tokens, K keys of a window's own, D and E the sizes of keys and values. A group has R rows, n
windows and c context tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.sampling import allows_dynamic_shapes

MAX_GROUP_SCORES_CPU = 2**18
"""Scores of a group: a CPU's cache holds them and what is computed from them."""
MIN_GROUP_WINDOWS = 8
"""A matrix product of fewer windows is slow, so a group has as many even where that exceeds `MAX_GROUP_SCORES_CPU`."""
MAX_GROUP_SCORES_GPU = 2**20


class Group(NamedTuple):
    """Windows that attend at once.

    Attributes:
        rows: of the B rows.
        windows: of the N windows of each row.
        columns: of the S context tokens; all that one of these windows sees lie here.
    """

    rows: slice
    windows: slice
    columns: slice


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys the queries of windows see.

    Attributes:
        context: `[B, N, S]` bool, true where all queries of a window see a context token.
        own: `[Q, K]` bool, true where a query of a window sees a key of this window; each query sees at least one.

    >>> context = torch.tensor([[[True, False, False], [True, True, False]]])  # two windows after 3 context tokens
    >>> VisibleKeys(context, torch.ones(2, 2, dtype=torch.bool).tril()).groups(num_heads=1)
    [Group(rows=slice(0, 1, None), windows=slice(0, 2, None), columns=slice(0, 2, None))]
    """

    context: Tensor
    own: Tensor
    _groups: dict[int, list[Group]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def groups(self, num_heads: int) -> Sequence[Group]:
        """All windows of all rows, in groups; their size depends on the number of heads.

        Windows stay in their order. Data modules draw starts that ascend, so the first groups see few context tokens.
        On a GPU, reading the mask's values would wait for the device: there a group is whole rows and sees all tokens.
        """
        if num_heads not in self._groups:  # the same in all layers and in the backward pass
            divide = self._by_visible_columns if allows_dynamic_shapes(self.context) else self._by_rows
            self._groups[num_heads] = list(divide(num_heads))
        return self._groups[num_heads]

    def biases(self, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What is added to scores, `[R, n, c]` and `[Q, K]`: 0, or minus infinity where a key is hidden."""
        seen = self.context[group.rows, group.windows, group.columns]
        return _bias(seen, dtype), _bias(self.own, dtype)

    def _by_rows(self, num_heads: int) -> Iterator[Group]:
        num_rows, num_windows, size = self.context.shape
        for rows in _evenly(num_rows, max(MAX_GROUP_SCORES_GPU // (num_windows * self._scores(num_heads)), 1)):
            yield Group(rows, slice(0, num_windows), slice(0, size))

    def _by_visible_columns(self, num_heads: int) -> Iterator[Group]:
        num_rows, num_windows, size = self.context.shape
        seen = self.context.to(torch.uint8)  # no argmax of bool
        # Of each window [B, N]: how many hidden tokens stand before all that it sees, and after them.
        before, after = seen.argmax(-1).numpy(), seen.flip(-1).argmax(-1).numpy()
        max_windows = max(MAX_GROUP_SCORES_CPU // self._scores(num_heads), MIN_GROUP_WINDOWS)
        for rows in _evenly(num_rows, max(max_windows // num_windows, 1)):
            for windows in _evenly(num_windows, max_windows):
                group = rows, windows
                yield Group(rows, windows, slice(int(before[group].min()), size - int(after[group].min())))

    def _scores(self, num_heads: int) -> int:
        """Number of scores of a window."""
        return num_heads * self.own.shape[0] * (self.context.shape[-1] + self.own.shape[1])


def block_attention(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    visible: VisibleKeys,
    scale: float,
) -> Tensor:
    """Softmax attention of windows, computed in float32 or better.

    Args:
        query: `[B, H, N, Q, D]`.
        context: keys `[B, H, S, D]` and values `[B, H, S, E]`.
        own: keys `[B, H, N, K, D]` and values `[B, H, N, K, E]` of the windows.
        visible: which keys a query sees.
        scale: of the scores.

    Returns:
        `[B, H, N, Q, E]`, with gradients for all tensors.
    """
    with torch.autocast(query.device.type, enabled=False):
        attended = _BlockAttention.apply(query, *context, *own, visible, scale)
    assert isinstance(attended, Tensor)
    return attended


class _BlockAttention(torch.autograd.Function):
    """`block_attention` with its backward pass."""

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
            attended = torch.empty_like(query)  # with the query's strides, so that heads can be joined without a copy
        else:
            attended = query.new_empty(*query.shape[:-1], own_values.shape[-1])
        for part in _parts(query, context_keys, own_keys, visible, scale):
            to_context, to_own = part.split(part.weights)
            result = to_own @ _by_window(own_values, part.group)
            part.by_row(result).baddbmm_(to_context, _context(context_values, part.group))
            _write(attended, part.group, result)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_attended: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        query, context_keys, context_values, own_keys, own_values = inputs
        visible, scale = ctx.visible, ctx.scale
        # Gradients of the context are sums over groups, so they begin at zero.
        new = torch.empty_like, torch.zeros_like, torch.zeros_like, torch.empty_like, torch.empty_like
        grads = [
            like(tensor) if needed else None
            for like, tensor, needed in zip(new, inputs, ctx.needs_input_grad, strict=False)
        ]
        grad_query, grad_context_keys, grad_context_values, grad_own_keys, grad_own_values = grads
        for part in _parts(query, context_keys, own_keys, visible, scale):
            group, queries, keys, group_context_keys, weights, grad_scores = part
            grad = _by_window(grad_attended, group)
            to_context, to_own = part.split(weights)
            if grad_context_values is not None:
                _add_to(grad_context_values, group, to_context.transpose(1, 2) @ part.by_row(grad))
            if grad_own_values is not None:
                _write(grad_own_values, group, to_own.transpose(1, 2) @ grad)
            # d score = weight (d weight - sum of weight times d weight)
            part.products(grad, _context(context_values, group), _by_window(own_values, group), grad_scores)
            torch._softmax_backward_data(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores)  # pyright: ignore[reportPrivateImportUsage]
            to_context, to_own = part.split(grad_scores)
            if grad_query is not None:
                grad_queries = torch.empty_like(queries).baddbmm_(to_own, keys, beta=0, alpha=scale)
                part.by_row(grad_queries).baddbmm_(to_context, group_context_keys, alpha=scale)
                _write(grad_query, group, grad_queries)
            if grad_context_keys is not None:
                _add_to(grad_context_keys, group, (to_context.transpose(1, 2) @ part.by_row(queries)).mul_(scale))
            if grad_own_keys is not None:
                _write(grad_own_keys, group, (to_own.transpose(1, 2) @ queries).mul_(scale))
        return (*grads, None, None)


class _Part(NamedTuple):
    """The tensors of a group, in float32 or better and contiguous.

    Attributes:
        group: the windows.
        queries: `[R * H * n, Q, D]`.
        keys: `[R * H * n, K, D]`, the windows' own.
        context_keys: `[R * H, c, D]`.
        weights: `[R * H, n * Q, c + K]`, attention weights.
        buffer: uninitialised memory of the same shape.
    """

    group: Group
    queries: Tensor
    keys: Tensor
    context_keys: Tensor
    weights: Tensor
    buffer: Tensor

    def by_row(self, tensor: Tensor) -> Tensor:
        """`[R * H * n, Q, D]` as `[R * H, n * Q, D]`."""
        return tensor.view(*self.weights.shape[:2], -1)

    def split(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Entries `[R * H, n * Q, c]` of the context, and entries `[R * H * n, Q, K]` of a window's own keys.

        The latter are made contiguous, because batched products of small strided matrices run one by one.
        """
        size = self.context_keys.shape[1]
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
        """Write the inner products of queries with keys of the context and of the window to `result`.

        Args:
            queries: `[R * H * n, Q, D]`.
            context: `[R * H, c, D]`.
            own: `[R * H * n, K, D]`.
            result: `[R * H, n * Q, c + K]`.
            scale: of the products.
            bias: `[Q, K]`, added to the products with the window's own keys.
        """
        size, own = context.shape[1], own.transpose(1, 2)
        result[..., :size].baddbmm_(self.by_row(queries), context.transpose(1, 2), beta=0, alpha=scale)
        of_own = queries @ own if bias is None else torch.baddbmm(bias, queries, own, alpha=scale)
        result[..., size:] = self.by_row(of_own)


def _parts(
    query: Tensor, context_keys: Tensor, own_keys: Tensor, visible: VisibleKeys, scale: float
) -> Iterator[_Part]:
    """The groups with their attention weights, one after the other; each part overwrites the memory of the last."""
    num_heads, num_queries, num_own = query.shape[1], query.shape[3], visible.own.shape[1]
    groups = visible.groups(num_heads)
    shapes = [
        (_length(rows) * num_heads, _length(windows) * num_queries, _length(columns) + num_own)
        for rows, windows, columns in groups
    ]
    dtype = torch.promote_types(query.dtype, torch.float32)
    largest = max(map(math.prod, shapes), default=0)
    first, second = (query.new_empty(largest, dtype=dtype) for _ in range(2))
    for group, shape in zip(groups, shapes, strict=True):
        scores, weights = (flat[: math.prod(shape)].view(shape) for flat in (first, second))
        queries, keys = _by_window(query, group), _by_window(own_keys, group)
        part = _Part(group, queries, keys, _context(context_keys, group), weights, scores)
        of_context, of_own = visible.biases(group, dtype)
        part.products(queries, part.context_keys, keys, scores, scale, of_own)
        num_rows, num_windows, size = of_context.shape
        by_window = scores.view(num_rows, num_heads, num_windows, num_queries, -1)
        by_window[..., :size].add_(of_context[:, None, :, None])
        torch.softmax(scores, -1, out=weights)
        yield part


def _by_window(tensor: Tensor, group: Group) -> Tensor:
    """A group's part of `[B, H, N, Q or K, D]`: `[R * H * n, Q or K, D]`, contiguous."""
    return _as_float32(tensor[group.rows, :, group.windows]).flatten(0, 2).contiguous()


def _context(tensor: Tensor, group: Group) -> Tensor:
    """A group's part of `[B, H, S, D]`: `[R * H, c, D]`."""
    return _as_float32(tensor[group.rows, :, group.columns]).flatten(0, 1)


def _write(total: Tensor, group: Group, part: Tensor) -> None:
    """Write a group's `[R * H * n, Q or K, D]` to `[B, H, N, Q or K, D]`."""
    target = total[group.rows, :, group.windows]
    target.copy_(part.view(target.shape))


def _add_to(total: Tensor, group: Group, part: Tensor) -> None:
    """Add a group's `[R * H, c, D]` to `[B, H, S, D]`."""
    target = total[group.rows, :, group.columns]
    target.add_(part.view(target.shape))


def _length(part: slice) -> int:
    return part.stop - part.start


def _as_float32(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _evenly(length: int, max_size: int) -> Iterator[slice]:
    """`length` cut into as few parts of at most `max_size` as possible, all of about the same size."""
    parts = math.ceil(length / max_size)
    ends = [length * part // parts for part in range(parts + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends))


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return seen.new_zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
