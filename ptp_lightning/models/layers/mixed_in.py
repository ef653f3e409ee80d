"""Classes of single modules: another `forward`, mixed into the class that a module of a library has.

A class rather than a `forward` of each object, so that code that torch compiles is the same for all layers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import nn


class MixedIn:
    """To be inherited by what `mix_in` is given; `super().forward` is that of the module's own class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For files and copies: the class is none that can be found by its name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, type(self).__bases__, *state)


def mix_in(module: nn.Module, kind: type[MixedIn]) -> None:
    """Change a module's class, in place; again is no change."""
    if not isinstance(module, kind):
        module.__class__ = _mixed(kind, type(module))


@cache
def _mixed(kind: type[MixedIn], of: type[nn.Module]) -> type[nn.Module]:
    return cast(type[nn.Module], type(of.__name__, (kind, of), {}))


def _new(kind: type[MixedIn], of: type[nn.Module]) -> nn.Module:
    made = _mixed(kind, of)
    return made.__new__(made)
