"""Copies of key-value caches that share their tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import Cache

AnyCache = TypeVar("AnyCache", bound="Cache")


def same_tensors(cache: AnyCache) -> AnyCache:
    """A copy of a cache that shares its tensors; appending to one does not change the other.

    This holds for a `DynamicCache`: it grows and shrinks by new tensors in its layers' attributes, never in place.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
