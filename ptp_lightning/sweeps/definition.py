"""Definition of a stored study, so that trials of different definitions are not mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import optuna
from optuna.distributions import distribution_to_json

from ptp_lightning.sweeps.attributes import DEFINITION
from ptp_lightning.sweeps.study import Study, short_name
from ptp_lightning.utils.renamed_keys import (
    RENAMED_KEYS,
    current_class_path,
    current_correction,
    current_key,
    deleted_settings,
    require_no_deleted_layers,
)

# Keys of the base configuration that do not change results, or that the study sets.
NOT_COMPARED = (
    "config",
    "checkpoint",
    "trainer.max_steps",
    "trainer.val_check_interval",
    "trainer.num_sanity_val_steps",
    "trainer.logger",
    "trainer.callbacks",
)
MAX_SHOWN = 12


def definition_of(study: Study, base: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must not change when a study is continued; seeds, trials and numbers of steps may be added.

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
        "budget": study.budget.definition(),
    }
    return json.loads(json.dumps(definition, default=str))  # as it is read back


def require_same(stored: optuna.Study, definition: Mapping[str, Any]) -> None:
    """Store the definition of a new study, or compare it with the stored one.

    Raises:
        ValueError: the stored definition differs; the error lists the differences. Or its refiners have layers that
            version 0.2 does not have any more.
    """
    if DEFINITION not in stored.user_attrs:
        stored.set_user_attr(DEFINITION, dict(definition))
    before = stored.user_attrs[DEFINITION]  # that of another process, if both start at once
    require_no_deleted_layers(before, f"the study {stored.study_name!r}")
    different = differences(with_current_names(before), definition)
    if different:
        more = [] if len(different) <= MAX_SHOWN else [f"and {len(different) - MAX_SHOWN} more"]
        raise ValueError(
            "\n  ".join(
                [
                    f"expected the study that {stored.study_name!r} was started as, found another one "
                    "(set another --output or --storage):",
                    *different[:MAX_SHOWN],
                    *more,
                ]
            )
        )


def with_current_names(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A stored definition of any version with the names of today, flattened.

    >>> with_current_names({"settings": {"refiner.rounds": 3}, "objective": {"metric": "best_of_{num_proposals}"}})
    {'settings.correction.init_args.num_refinement_steps': 3, 'objective.metric': 'best_of_{num_drafts}'}
    """
    flat = _with_corrections(flattened(definition))
    ignored = (*(f"base.{path}" for path in NOT_COMPARED), *deleted_settings(flat))
    return {current_key(key): _current_value(key, value) for key, value in flat.items() if not _is_below(key, ignored)}


def _with_corrections(flat: dict[str, Any]) -> dict[str, Any]:
    """Every whole `predictor.refiner` of a flattened definition as `predictor.correction`."""
    for parent in [key.removesuffix(".num_layers") for key in flat if key.endswith("predictor.refiner.num_layers")]:
        refiner = {key.removeprefix(f"{parent}."): value for key, value in flat.items() if _is_below(key, (parent,))}
        flat = {key: value for key, value in flat.items() if not _is_below(key, (parent,))}
        flat |= flattened({current_key(parent): current_correction(refiner)})
    return flat


def _current_value(key: str, value: Any) -> Any:
    if key == "objective.metric":  # with names of parameters in braces
        for old, new in RENAMED_KEYS.items():
            value = value.replace(f"{{{short_name(old)}}}", f"{{{short_name(new)}}}")
    return current_class_path(value) if isinstance(value, str) else value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key at which nested data differ; a key without a value counts as null.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b: was 1, is 2']
    """
    old, new = flattened(before), flattened(now)
    missing = "nothing"
    return [
        f"{path}: was {_shown(old.get(path, missing))}, is {_shown(new.get(path, missing))}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; empty mappings stay, because they may be choices.

    Empty `init_args` are left out: they hold no setting.

    >>> flattened({"a": {"b": 1}, "c": {}})
    {'a.b': 1, 'c': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{path}.")
        elif short_name(path) != "init_args" or value != {}:
            flat[path] = value
    return flat


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
