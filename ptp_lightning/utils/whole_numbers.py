"""Integers that callers give: of Python, NumPy or torch, but neither fractions nor truth values."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any


def whole_number(given: Any, key: str) -> int:
    """One integer.

    Args:
        given: by the caller; a tensor or array is one number only without dimensions.
        key: the argument that holds it.

    Raises:
        ValueError: it is no integer.

    >>> whole_number(2.5, "seed")
    Traceback (most recent call last):
    ValueError: expected an integer, found 2.5: set seed
    """
    single = given.item() if hasattr(given, "item") and not getattr(given, "shape", ()) else given
    try:
        if not isinstance(single, bool) and not getattr(single, "shape", ()):
            return operator.index(single)
    except TypeError:
        pass
    raise ValueError(f"expected an integer, found {short(single)}: set {key}")


def whole_numbers(given: Iterable[Any], key: str) -> list[int]:
    """Several integers; arguments and errors as in `whole_number`.

    >>> import torch
    >>> whole_numbers(torch.tensor([3, 5]), "prompt")
    [3, 5]
    """
    # An array gives its numbers at once: one after another, each would wait for the device.
    plain: Any = given.tolist() if hasattr(given, "tolist") else given  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(plain, Iterable):
        raise ValueError(f"expected several integers, found {short(plain)}: set {key}")
    return [whole_number(one, key) for one in plain]


def one_or_several(given: Any, key: str) -> int | tuple[int, ...]:
    """An integer, or a sequence of integers as a tuple; errors as in `whole_number`."""
    return tuple(whole_numbers(given, key)) if isinstance(given, Sequence) else whole_number(given, key)


def short(given: object) -> str:
    """A value for an error message: the beginning of its `repr`, in one line."""
    return " ".join(reprlib.repr(given).split())
