"""The settings of a run under flat, short names, for the tables of loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Setting = bool | int | float | str

TRAINER_KEYS = (
    "max_steps",
    "max_epochs",
    "max_time",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "val_check_interval",
    "strategy",
    "devices",
    "num_nodes",
)
"""The keys below `trainer` that influence results."""

FIRST = (
    "model",
    "objective",
    "loss",
    "correction",
    "optimizer.learning_rate",
    "lora.rank",
    "window_length",
    "slot_layers",
    "features",
    "student",
    "source",
    "position_weights",
    "backbone.path",
    "max_steps",
    "data.batch_size",
    "data.num_windows",
)
"""The settings that people compare most; tables begin with them. All others keep the order of the configuration."""

SKIPPED_SEGMENTS = {"init_args", "from_config", "predictor"}
"""Parts of a path without a meaning of their own."""


def flat_settings(config: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings of model, data and trainer, without those that are null; those of `FIRST` come first.

    The names of components are those of their classes. A path loses what all paths have in common; it keeps it if two
    settings would have the same name.

    Args:
        config: of `fit`, as plain data.

    >>> predictor = {"lora": {"rank": 4}, "objective": {"class_path": "ptp_lightning.models.OneHotObjective"}}
    >>> model = {"class_path": "ptp_lightning.training.DistillationModule", "init_args": {"predictor": predictor}}
    >>> flat_settings({"model": model, "trainer": {"max_steps": 9, "logger": True}})
    {'model': 'DistillationModule', 'objective': 'OneHotObjective', 'lora.rank': 4, 'max_steps': 9}
    """
    trainer = config.get("trainer", {})
    chosen = {
        "seed_everything": config.get("seed_everything"),
        "model": config.get("model"),
        "data": config.get("data"),
        "trainer": {key: trainer[key] for key in TRAINER_KEYS if key in trainer},
    }
    settings: dict[str, Setting] = {}
    for path, value in _leaves(chosen, ()):
        name = ".".join(_short(path))
        settings[".".join(path) if name in settings else name] = value
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    return dict(sorted(settings.items(), key=lambda setting: ranks.get(setting[0], len(FIRST))))  # stable


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Setting]]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield path, str(value["class_path"]).rpartition(".")[2]
        for key, entry in value.items():
            if key != "class_path":
                yield from _leaves(entry, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(entry, Mapping) for entry in value):
            for number, entry in enumerate(value):
                yield from _leaves(entry, (*path, str(number)))
        else:
            yield path, ", ".join(map(str, value))
    elif value is not None:
        yield path, value if isinstance(value, bool | int | float | str) else str(value)


def _short(path: tuple[str, ...]) -> tuple[str, ...]:
    if len(path) > 1 and path[0] in ("model", "trainer"):
        path = path[1:]
    return tuple(segment for segment in path if segment not in SKIPPED_SEGMENTS)
