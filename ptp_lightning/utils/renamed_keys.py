"""Names of version 0.1 in configurations and their names of today: an old name is an error that states the new one.

The tables are closed. Stored files with these names are not refused but migrated, see
`ptp_lightning.export.migrations`; those that use what has been deleted are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RENAMED_KEYS = {
    # configurations of runs
    "refiner.rounds": "correction.num_refinement_steps",
    "predictor.refiner": "predictor.correction",
    "series.fitted_share": "series.fit_fraction",
    "model.num_proposals": "model.num_drafts",
    "optimizer.other_learning_rate": "optimizer.adamw_learning_rate",
    **{
        f"{source}.{old}": f"{source}.{new}"
        for source in ("source", "val_source", "sources")
        for old, new in {
            "start": "initial_weights",
            "end": "final_weights",
            "begin": "schedule_start",
            "until": "schedule_end",
        }.items()
    },
    # studies
    "also": "extra_metrics",
    "decode_lengths": "draft_lengths",
    "prepare.makes": "prepare.output",
    "prepare.passed_on": "prepare.forwarded_keys",
}
"""Parts of dotted keys, `init_args` left out: before and now."""

REFINER_CLASS = "ptp_lightning.models.DecoderRefiner"
"""What `predictor.refiner` with one layer or more is now."""

HEAD_CLASS = "ptp_lightning.models.TokenConditionedHead"
"""What to train instead of a refiner with copied or base layers."""

DELETED_ADVICE = "nothing, leave it out"

REFINER_ADVICE = f"  (a refiner is a class now: {{class_path: {REFINER_CLASS}, init_args: {{..}}}}, or null for none)"

DELETED_SETTINGS = {"base_layers": 0, "start": "random"}
"""Settings of a refiner that it does not have any more: their values in stored files that can still be used."""

RENAMED_MODULES = {
    "data.completions_datamodule": "data",
    "data.file_rows": "data",
    "data.hub_rows": "data",
    "data.markov": "data",
    "data.mixture": "data",
    "data.pickups": "data",
    "data.series": "data",
    "data.series_datamodule": "data",
    "data.streaming": "data",
    "models.continuous_features": "models",
    "models.predictor_config": "models",
    "models.slots": "models",
    "models.stepped_features": "models",
    "training.analytic_windows": "training",
    "training.checkpoint_io": "training.distributed.checkpoint_io",
    "training.distillation": "training",
    "training.mixture_windows": "training",
    "training.pretraining": "training",
    "training.self_training": "training",
    "training.strategies": "training",
    "training.student_windows": "training",
    "training.termination": "training.distributed.termination",
    "training.windows": "training",
}
"""Modules below `ptp_lightning` with classes that configurations name, and where these classes are now."""

RENAMED_CLASSES: dict[str, str] = {}
"""Classes below `ptp_lightning` that have another name in their present module."""

PACKAGE = "ptp_lightning."


def current_class_path(class_path: str) -> str:
    """A class path of version 0.1 as it is now; others as they are.

    >>> current_class_path("ptp_lightning.training.pretraining.AutoregressiveModule")
    'ptp_lightning.training.AutoregressiveModule'
    >>> current_class_path("ptp_lightning.training.DistillationModule")
    'ptp_lightning.training.DistillationModule'
    """
    module, _, name = class_path.removeprefix(PACKAGE).rpartition(".")
    if not class_path.startswith(PACKAGE):
        return class_path
    moved = f"{RENAMED_MODULES.get(module, module)}.{name}"
    return PACKAGE + RENAMED_CLASSES.get(moved, moved)


def current_key(key: str) -> str:
    """A dotted key of version 0.1 as it is now; others as they are.

    >>> current_key("model.init_args.predictor.refiner.rounds")
    'model.init_args.predictor.correction.init_args.num_refinement_steps'
    """
    parts = key.split(".")
    for old, new in RENAMED_KEYS.items():
        positions = _positions(parts, old.split("."))
        for position, part in zip(positions, new.split("."), strict=False):
            parts[position] = part
        if positions and "refiner" in old:  # its settings are now those of a class
            settings = parts.index("correction", positions[0]) + 1
            if parts[settings : settings + 1] not in ([], ["init_args"]):
                parts.insert(settings, "init_args")
    return ".".join(parts)


def current_correction(refiner: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings `predictor.refiner` of version 0.1 as the `predictor.correction` that they are now.

    >>> current_correction({"num_layers": 1, "rounds": 3})
    {'class_path': 'ptp_lightning.models.DecoderRefiner', 'init_args': {'num_layers': 1, 'num_refinement_steps': 3}}
    >>> current_correction({"num_layers": 0}) is None
    True
    """
    if not refiner.get("num_layers", 0):  # 0 was the default
        return None
    settings = {"num_refinement_steps" if name == "rounds" else name: value for name, value in refiner.items()}
    return {"class_path": REFINER_CLASS, "init_args": _without_deleted(settings)}


def with_current_names(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data with the keys and class paths of today; lists stay as they are.

    >>> with_current_names({"refiner": {"num_layers": 1}})
    {'correction': {'class_path': 'ptp_lightning.models.DecoderRefiner', 'init_args': {'num_layers': 1}}}
    """
    renamed: dict[str, Any] = {}
    depth = len(current_key(prefix).split(".")) - 1
    for key, value in config.items():
        path = f"{prefix}{key}"
        if key == "refiner" and isinstance(value, Mapping):
            renamed["correction"] = current_correction(value)
            continue
        now = current_key(path).split(".")[depth:]
        if isinstance(value, Mapping):
            value = with_current_names(value, f"{path}.")
            if value.get("class_path") == REFINER_CLASS and "init_args" in value:
                value["init_args"] = _without_deleted(value["init_args"])
        elif isinstance(value, str):
            value = current_class_path(value)
        renamed[".".join(now)] = value
    return renamed


def deleted_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of all `DELETED_SETTINGS` of refiners.

    >>> deleted_settings({"predictor.refiner.base_layers": 4, "source": {"start": [1.0]}})
    {'predictor.refiner.base_layers': 4}
    """
    entries = dict(_entries(config))
    found: dict[str, Any] = {}
    for key, value in entries.items():
        parent, _, name = key.rpartition(".")
        parent = parent.removesuffix(".init_args")
        if name in DELETED_SETTINGS and parent.rpartition(".")[2] in ("refiner", "correction"):
            chosen = entries.get(f"{parent}.class_path", entries.get(parent))
            if not isinstance(chosen, str) or chosen in (REFINER_CLASS, REFINER_CLASS.rpartition(".")[2]):
                found[key] = value
    return found


def require_no_deleted_layers(config: Mapping[str, Any], source: str) -> None:
    """Refuse refiners with the base model's first layers, or with copies of its last ones.

    Args:
        config: nested, or with dotted keys, or both.
        source: a file or a command, for the error.

    Raises:
        ValueError: there is one.

    >>> require_no_deleted_layers({"refiner": {"base_layers": 4}}, "my.yaml")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: my.yaml: expected no refiner.base_layers, found 4: version 0.2 has no such layers any more; set ...
    """
    for key, value in deleted_settings(config).items():
        if str(value) != str(DELETED_SETTINGS[key.rpartition(".")[2]]):  # the command line has text alone
            raise ValueError(
                f"{source}: expected no {key}, found {value}: version 0.2 has no such layers any more; set "
                f"predictor.correction to {HEAD_CLASS} and train again, or use version 0.1"
            )


def require_current_names(config: Mapping[str, Any], source: str) -> None:
    """Refuse keys and class paths of version 0.1.

    Args:
        config: nested, or with dotted keys, or both.
        source: a file or a command, for the error.

    Raises:
        ValueError: all names that are not in use any more, and those that are; or as `require_no_deleted_layers`.

    >>> require_current_names({"refiner": {"rounds": 3}}, "my.yaml")
    Traceback (most recent call last):
    ...
    ValueError: my.yaml: names of version 0.1, rename them
      refiner.rounds -> correction.init_args.num_refinement_steps
      (a refiner is a class now: {class_path: ptp_lightning.models.DecoderRefiner, init_args: {..}}, or null for none)
    """
    require_no_deleted_layers(config, source)
    renamed = dict.fromkeys(deleted_settings(config), DELETED_ADVICE)
    for key, value in _entries(config):
        if key in renamed:
            continue
        if (key_now := current_key(key)) != key:
            renamed[key] = key_now
        if isinstance(value, str) and (path := current_class_path(value)) != value:
            renamed[value] = path
    if renamed:
        lines = [f"  {old} -> {new}" for old, new in renamed.items()]
        if any("refiner" in old for old, new in renamed.items() if new != DELETED_ADVICE):
            lines.append(REFINER_ADVICE)
        raise ValueError("\n".join([f"{source}: names of version 0.1, rename them", *lines]))


def _without_deleted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if (name, value) not in DELETED_SETTINGS.items()}


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of everything, mappings and items of lists included."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        yield path, value
        items: Sequence[Any] = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, Mapping):
                yield from _entries(item, f"{path}.")
            elif item is not value:
                yield path, item


def _positions(parts: Sequence[str], old: Sequence[str]) -> list[int]:
    """Where the parts of an old name stand in a key, one after the other but for `init_args`; empty if they do not."""
    named = [k for k, part in enumerate(parts) if part.removesuffix("+") != "init_args"]
    for first in range(len(named) - len(old) + 1):
        window = named[first : first + len(old)]
        if [parts[k] for k in window] == list(old):
            return window
    return []
