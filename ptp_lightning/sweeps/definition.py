"""What a stored study was started with, so that trials of another one are not mixed with its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import optuna
from optuna.distributions import distribution_to_json

from ptp_lightning.sweeps.attributes import DEFINITION
from ptp_lightning.sweeps.study import Study

# Of the base configuration: where its file lies, what a study sets itself, and what only shows.
NOT_COMPARED = (
    "config",
    "checkpoint",
    "trainer.max_steps",
    "trainer.val_check_interval",
    "trainer.logger",
    "trainer.callbacks",
)
MAX_SHOWN = 12


def definition_of(study: Study, base: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that has to stay as it is when a study goes on; more seeds and trials may be added.

    Args:
        study: the study.
        base: its resolved base configuration, as nested plain data.
    """
    flat = flattened(base)
    left_out = (*NOT_COMPARED, *study.seed_paths)
    compared = {path: value for path, value in flat.items() if not _is_below(path, left_out)}
    space = {name: json.loads(distribution_to_json(distribution)) for name, distribution in study.settings.items()}
    definition = {
        "base": compared,
        "space": flattened(study.variants | space),
        "objective": asdict(study.objective),
        "budget": asdict(study.budget),
    }
    return json.loads(json.dumps(definition, default=str))  # as it will be read back


def require_same(stored: optuna.Study, definition: Mapping[str, Any]) -> None:
    """Note down the definition of a new study, and compare that of an old one.

    Raises:
        ValueError: the study was started with another definition; shows the difference.
    """
    before = stored.user_attrs.get(DEFINITION)
    if before is None:
        stored.set_user_attr(DEFINITION, dict(definition))
        return
    different = differences(before, definition)
    if different:
        more = [] if len(different) <= MAX_SHOWN else [f"and {len(different) - MAX_SHOWN} more"]
        raise ValueError(
            "\n  ".join(
                [
                    f"expected the study that {stored.study_name!r} was started as, found another one "
                    "(use another --output or --storage for it):",
                    *different[:MAX_SHOWN],
                    *more,
                ]
            )
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each path at which nested data differ."""
    old, new = flattened(before), flattened(now)
    missing = "nothing"
    return [
        f"{path}: was {_shown(old.get(path, missing))}, is {_shown(new.get(path, missing))}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path, missing) != new.get(path, missing)
    ]


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted paths; empty ones stay, because they may be choices."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
