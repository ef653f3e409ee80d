"""Caches of keys and values that go on in two ways from one point."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import Cache

AnyCache = TypeVar("AnyCache", bound="Cache")


def same_tensors(cache: AnyCache) -> AnyCache:
    """A cache that shares all tensors with a given one, and stays as it is when that one goes on, and the reverse.

    A `DynamicCache` grows and shrinks by new tensors in the attributes of its layers, never inside old ones.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
