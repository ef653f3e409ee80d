"""Tensors a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

PART_ROWS = 1024


def in_parts(tensor: Tensor) -> Sequence[Tensor]:
    """Rows `[..., D]` as a few `[m, D]` at a time: on a CPU, what is made of them stays in the cache, and is small."""
    rows = tensor.flatten(0, -2)
    return [rows] if rows.is_cuda or len(rows) <= PART_ROWS else rows.split(PART_ROWS)


def in_batch_parts(tensor: Tensor) -> Sequence[Tensor]:
    """`[B, T, ...]` as a few of B at a time, likewise."""
    at_once = max(PART_ROWS // max(tensor.shape[1], 1), 1)
    return [tensor] if tensor.is_cuda or len(tensor) <= at_once else tensor.split(at_once)
