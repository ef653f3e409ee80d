"""Functions of many slots, evaluated a chunk at a time so that the logits of all slots never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

CHUNK_SLOTS = 1024  # slots whose logits exist at the same time

Result = TypeVar("Result")


def map_chunks(function: Callable[..., Result], *rows: Tensor) -> list[Result]:
    """The results of `function` for `CHUNK_SLOTS` rows of each tensor at a time."""
    return [function(*chunk) for chunk in zip(*(tensor.split(CHUNK_SLOTS) for tensor in rows), strict=True)]
