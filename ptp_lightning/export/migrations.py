"""Stored files of earlier versions: what was renamed since, in one table.

Files of version 0.1 (exported folders, Lightning checkpoints) hold the old names; `migrated_config` and
`migrated_state` give them today's. The table is closed: a name that is not in it stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

FORMAT_VERSION = 2
"""Of what this version writes. 1: version 0.1."""

RENAMED_SETTINGS = {"refiner": {"rounds": "num_refinement_steps"}}
"""Of a `PredictorConfig` as plain data: by its key, names of settings before and now."""

RENAMED_WEIGHTS = {"slot_encoder.token_places": "slot_encoder.token_ranks"}
"""Of `PredictorNetwork.trainable_state`: names before and now."""


def migrated_config(config: dict[str, Any]) -> dict[str, Any]:
    """Plain data of a predictor's configuration, whichever version wrote it, with today's names.

    >>> migrated_config({"refiner": {"num_layers": 1, "rounds": 3}})
    {'refiner': {'num_layers': 1, 'num_refinement_steps': 3}}
    """
    renamed = dict(config)
    for key, names in RENAMED_SETTINGS.items():
        if isinstance(renamed.get(key), dict):
            renamed[key] = {names.get(name, name): value for name, value in renamed[key].items()}
    return renamed


def migrated_state(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Weights by name, whichever version wrote them, with today's names, which begin with `prefix`."""
    names = {prefix + old: prefix + new for old, new in RENAMED_WEIGHTS.items()}
    return {names.get(name, name): value for name, value in state.items()}
