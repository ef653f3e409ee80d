"""Class names in configurations: which ones exist, and which one a misspelt name may mean."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

PACKAGES = ("models", "losses", "training", "training.loggers", "data", "auxiliary_strategies")
"""Modules of this package whose classes configurations name."""

BASES = {
    "features": "models.AuxiliaryFeatures",
    "objective": "models.Objective",
    "student": "models.Student",
    "correction": "models.Correction",
    "loss": "losses.Loss",
    "slot_loss": "losses.Loss",
    "position_weights": "losses.PositionWeights",
    "source": "training.WindowSource",
    "sources": "training.WindowSource",
    "strategy": "auxiliary_strategies.AuxiliaryStrategy",
    "corpus": "data.Corpus",
    "series": "data.Series",
    "rendering": "data.Rendering",
    "model": "training.TrainingModule",
    "data": "data.PackedDataModule",
}
"""Base classes of this package, by the last part of a key."""

LIGHTNING_BASES = {"callbacks": "lightning.pytorch.callbacks.Callback", "logger": "lightning.pytorch.loggers.Logger"}
"""Base classes of Lightning, by the last part of a key."""

ROWS_OF_A_STREAM = "data.RowSource"  # the source of a `StreamPart`

_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)"')
_UNKNOWN = re.compile(
    r"Problem with given class_path '(?P<path>[\w.]+)':\s*(?P<reason>module '[\w.]+' has no attribute|No module named)"
    r"|Expected a dot import path string: (?P<name>[^\W\d]\w*)"
    r"|Import path (?P<other>[\w.]+) does not correspond to a subclass of \w+"
)


def unknown_class(message: str) -> str | None:
    """One line for an error of jsonargparse about a class that does not exist or is of another kind; else None.

    >>> unknown_class('Parser key "correction": Expected a dot import path string: MarkovHed').partition(" There")[0]
    'expected a class of Correction for correction, found MarkovHed: did you mean ptp_lightning.models.MarkovHead?'
    """
    found, keys = list(_UNKNOWN.finditer(message)), _KEY.findall(message)
    base = _base_of(keys[-1], message) if found and keys else None
    if base is None:
        return None
    match, classes = found[-1], concrete_classes(base)
    class_path = match["path"] or match["name"] or match["other"]
    nearest = _nearest_module(class_path) if match["reason"] == "No module named" else None
    nearest = nearest or _nearest_class(class_path, classes)
    if match["other"]:
        hint = "it is of another kind."
    elif nearest:
        hint = f"did you mean {nearest}?"
    else:
        hint = "it does not exist."
    return (
        f"expected a class of {base.__name__} for {keys[-1]}, found {class_path}: {hint} There are {_listed(classes)}, "
        "and those in modules of the current folder"
    )


def concrete_classes(base: type) -> list[type]:
    """Public classes below a base class that can be built, those of imported modules included."""
    below = [one for child in base.__subclasses__() for one in [child, *concrete_classes(child)]]
    return [one for one in dict.fromkeys(below) if not inspect.isabstract(one) and _is_public(one)]


def _is_public(one: type) -> bool:
    """Whether configurations may name a class: ours if its package exports it."""
    home = sys.modules.get(_shown(one).rpartition(".")[0])
    return home is None or one.__name__ in getattr(home, "__all__", vars(home))


def _base_of(key: str, message: str) -> type | None:
    last = key.rpartition(".")[2]
    place = ROWS_OF_A_STREAM if last == "source" and "parts" in message else BASES.get(last)
    path = LIGHTNING_BASES.get(last) if place is None else f"ptp_lightning.{place}"
    if path is None:
        return None
    for package in PACKAGES:  # whose import defines the subclasses
        import_module(f"ptp_lightning.{package}")
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _nearest_class(class_path: str, classes: Iterable[type]) -> str | None:
    by_name = {one.__name__: _shown(one) for one in classes}
    nearest = get_close_matches(class_path.rpartition(".")[2], by_name, n=1)
    return by_name[nearest[0]] if nearest else None


def _nearest_module(class_path: str) -> str | None:
    """The same class of a module in the current folder whose name is nearly that."""
    module, _, name = class_path.rpartition(".")
    nearest = get_close_matches(module, [path.stem for path in Path().glob("*.py")], n=1)
    return f"{nearest[0]}.{name}" if nearest else None


def _listed(classes: Iterable[type]) -> str:
    """Our own classes by their names, grouped by package; others by their whole names."""
    groups: dict[str, list[str]] = {}
    parts = [_shown(one).rpartition(".") for one in classes]
    for home, _, name in sorted(parts, key=lambda part: (not part[0].startswith("ptp_lightning."), part)):
        groups.setdefault(home, []).append(name)
    return ", and ".join(f"{', '.join(names)} of {home}" for home, names in groups.items())


def _shown(one: type) -> str:
    """Our own classes and those of Lightning by their public home, the outermost package that exports them."""
    parts = one.__module__.split(".")
    if parts[0] not in ("ptp_lightning", "lightning"):
        return f"{one.__module__}.{one.__qualname__}"
    homes = [".".join(parts[:depth]) for depth in range(2, len(parts) + 1)]
    exporting = (home for home in homes if one.__name__ in getattr(sys.modules.get(home), "__all__", ()))
    return f"{next(exporting, homes[0])}.{one.__name__}"
