"""Classes that a stored configuration names: which of them may be imported.

A class is imported by its name, and an import runs code. A configuration that comes with weights may be somebody
else's, so it may name only classes of this package, unless its user trusts others.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ptp_lightning.option_names import TRUST_OPTION

PUBLIC_HOME = "ptp_lightning.models"


def class_path_of(part: object) -> str:
    """The class of a part as configurations name it.

    >>> from ptp_lightning.models import CosineFeatures
    >>> class_path_of(CosineFeatures())
    'ptp_lightning.models.CosineFeatures'
    """
    return _public_name(f"{type(part).__module__}.{type(part).__qualname__}")


def with_public_names(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data in which our classes have their public names, which stay when files are moved."""
    return {
        key: with_public_names(value)
        if isinstance(value, Mapping)
        else _public_name(value)
        if key == "class_path" and isinstance(value, str)
        else value
        for key, value in plain.items()
    }


def require_trusted_classes(
    plain: Mapping[str, Any], text_fields: Collection[str], trusted: Collection[str] = ()
) -> None:
    """Refuse plain data with which a parser would import other classes than our own.

    Args:
        plain: with public names, see `with_public_names`.
        text_fields: entries of `plain` that are text. In any other entry a parser takes text for the name of a class.
        trusted: class paths that may be imported as well.

    Raises:
        ValueError: names the class. Nothing has been imported.

    >>> require_trusted_classes({"features": {"class_path": "my_adapter.evil.Features"}}, ["head"])
    Traceback (most recent call last):
    ...
    ValueError: expected classes of ptp_lightning.models, found 'my_adapter.evil.Features', whose import can run any \
code: set trust_custom_classes if you trust it
    """
    named = [entry for name, entry in plain.items() if isinstance(entry, str) and name not in text_fields]
    for class_path in [*named, *_class_paths(plain)]:
        if not isinstance(class_path, str):
            raise ValueError(f"expected the name of a class as class_path, found {class_path!r}")
        if class_path not in trusted and class_path not in _own_classes():
            raise ValueError(
                f"expected classes of {PUBLIC_HOME}, found {class_path!r}, whose import can run any code: set "
                f"{TRUST_OPTION} if you trust it"
            )


def _class_paths(plain: object) -> Iterator[object]:
    """The values of `class_path` at any depth.

    Raises:
        ValueError: a key has a dot, which a parser takes for nested keys.
    """
    if isinstance(plain, Mapping):
        for name, value in plain.items():
            if "." in str(name):
                raise ValueError(f"expected nested keys in a stored configuration, found {name!r}")
            yield from [value] if name == "class_path" else _class_paths(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _class_paths(value)


def _own_classes() -> set[str]:
    from ptp_lightning import models

    return {f"{PUBLIC_HOME}.{name}" for name in models.__all__ if not inspect.isabstract(getattr(models, name))}


def _public_name(class_path: str) -> str:
    """Our own classes by their public home; others as they are."""
    ours = class_path.startswith(f"{PUBLIC_HOME}.")
    return f"{PUBLIC_HOME}.{class_path.rpartition('.')[2]}" if ours else class_path
