"""Replacing single modules of a library's model by ours: the one mechanism by which layers are changed.

A replacement takes over the parameters and submodules of the original under their names, so that checkpoints, adapters
and sharding rules fit as before. It is an object of an ordinary class: it can be copied and pickled, and torch compiles
its code once for all layers. Neither holds for a patched `forward` of each object or a changed `__class__`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn


def full_name(kind: type) -> str:
    """A class's name with its module's, as tables of supported classes list it without importing it.

    >>> full_name(nn.Linear)
    'torch.nn.modules.linear.Linear'
    """
    return f"{kind.__module__}.{kind.__qualname__}"


def replace_modules(
    model: nn.Module,
    supported: Collection[str],
    build: Callable[[nn.Module], nn.Module],
    condition: Callable[[nn.Module], bool] = lambda module: True,
) -> None:
    """Replace modules below a model, in place.

    Args:
        model: itself not replaced.
        supported: full names of classes whose modules are replaced; subclasses are not, which may compute anything.
        build: makes the replacement of a module.
        condition: whether a module of a supported class is replaced.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> replace_modules(model, {full_name(nn.ReLU)}, lambda module: nn.Tanh())
    >>> type(model[1]).__name__
    'Tanh'
    """
    found = [name for name, module in model.named_modules() if full_name(type(module)) in supported and name]
    for name in found:
        module = model.get_submodule(name)
        if condition(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, build(module))
