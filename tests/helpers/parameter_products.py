"""Products of parameters of which CI tries a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def one_in(number: int, *, ids: Callable[[Any], str] | None = None, **values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with a product; all but every `number`-th combination are slow.

    The indices of the values of a combination that CI tries add up to a multiple of `number`. So each value is tried,
    and so is each pair of values of two parameters if a third one has at least `number` values. `pytest -m slow` tries
    the other combinations.

    Args:
        number: at most the length of the longest list but one, or some values would be tried in slow tests alone.
        ids: names a value; by default the name of a function or class, else the value as text.
        **values: the values of each parameter.
    """
    lists = [list(given) for given in values.values()]
    assert number <= sorted(map(len, lists))[-2], "some values would be tried in slow tests alone"
    combinations = []
    for numbered in product(*map(enumerate, lists)):
        marks = [pytest.mark.slow] if sum(index for index, _ in numbered) % number else []
        chosen = [value for _, value in numbered]
        name = "-".join((ids or _name)(value) for value in chosen)
        combinations.append(pytest.param(*chosen, marks=marks, id=name))
    return pytest.mark.parametrize(list(values), combinations)


def _name(value: Any) -> str:
    return getattr(value, "__name__", str(value))
