"""Tensors some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

PART_ROWS = 1024


def in_parts(tensor: Tensor) -> Sequence[Tensor]:
    """Rows `[..., D]` in parts `[m, D]`: on a CPU, intermediates of a part are small and stay in the cache.

    Parts of a contiguous tensor can be written to; those of another one may be copies.
    """
    rows = tensor.flatten(0, -2)
    return [rows] if rows.is_cuda or len(rows) <= PART_ROWS else rows.split(PART_ROWS)


def in_batch_parts(tensor: Tensor) -> Sequence[Tensor]:
    """`[B, T, ...]` in parts of the batch, likewise."""
    batch_size = max(PART_ROWS // max(tensor.shape[1], 1), 1)
    return [tensor] if tensor.is_cuda or len(tensor) <= batch_size else tensor.split(batch_size)
