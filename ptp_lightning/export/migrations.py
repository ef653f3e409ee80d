"""Stored files of earlier versions: migrated to the names of today when they are read.

| file | version 0.1 | version 0.2 | since `predictor.correction` |
|---|---|---|---|
| `predictor.json` of an exported folder | `format_version` 1 | 2 | 3 |
| Lightning checkpoint, entry `predictor` | no `format_version` | 2 | 3 |

Renamed settings are those of `ptp_lightning.utils.renamed_keys`; renamed weights are below. Both tables are closed. A
refiner of any of these formats may have layers that version 0.2 does not have any more; then the file is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptp_lightning.utils.renamed_keys import require_no_deleted_layers, with_current_names

CHECKPOINT_KEY = "ckpt_path"
"""The option that names files of predictors."""

FORMAT_VERSION = 3
"""The format that this version writes."""

FIRST_FORMAT_VERSION = 1
"""That of version 0.1, also of checkpoints without an entry."""

RENAMED_WEIGHTS = {
    "slot_encoder.token_places": "slot_encoder.token_ranks",
    "slot_encoder.settings.": "slot_encoder.sampling_encoder.",
    "slot_encoder.refiner_settings.": "slot_encoder.correction_sampling_encoder.",
    "slot_encoder.refiner_sampling_encoder.": "slot_encoder.correction_sampling_encoder.",
    "slot_encoder.refiner.": "slot_encoder.correction.",
}
"""Names in `PredictorNetwork.trainable_state`, or their beginnings up to a dot: before and now."""


def require_known_format(version: object, source: str) -> None:
    """Refuse files of later versions.

    Args:
        version: the file's `format_version`.
        source: the file, for the error.

    Raises:
        ValueError: the version is unknown.
    """
    if not isinstance(version, int) or not FIRST_FORMAT_VERSION <= version <= FORMAT_VERSION:
        raise ValueError(
            f"expected format_version {FIRST_FORMAT_VERSION} to {FORMAT_VERSION} in {source}, found {version}: "
            "update ptp_lightning, or export it again with this version"
        )


def migrated_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Plain data of a predictor's configuration of any version, with the names of today.

    Args:
        config: the data.
        source: the file, for the error.

    Raises:
        ValueError: its refiner has layers that version 0.2 does not have any more.

    >>> migrated_config({"window_length": 8, "refiner": {"num_layers": 0, "rounds": 3}}, "predictor.json")
    {'window_length': 8, 'correction': None}
    """
    require_no_deleted_layers(config, source)
    return with_current_names(config)


def migrated_state(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Weights of any version by the names of today, which all begin with `prefix`."""
    return {prefix + _current_weight(name.removeprefix(prefix)): value for name, value in state.items()}


def _current_weight(name: str) -> str:
    for old, new in RENAMED_WEIGHTS.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name


def migrate_checkpoint(checkpoint: dict[str, Any], source: str) -> None:
    """Bring a Lightning checkpoint of a predictor of any version up to date, in place.

    Args:
        checkpoint: with the entries `predictor` and `state_dict`, see `PredictorModule.on_save_checkpoint`.
        source: the file, for errors.

    Raises:
        ValueError: it holds no predictor, a later version wrote it, or its refiner has layers that version 0.2 does
            not have any more.
    """
    if not isinstance(checkpoint, dict) or "predictor" not in checkpoint:
        raise ValueError(f"expected a checkpoint with a predictor, found {source} without one: set {CHECKPOINT_KEY}")
    about, state = checkpoint["predictor"], checkpoint.get("state_dict")
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict) or not isinstance(state, dict):
        raise ValueError(
            f"expected settings and weights of a predictor in {source}, found others: set {CHECKPOINT_KEY}"
        )
    require_known_format(about.get("format_version", FIRST_FORMAT_VERSION), source)
    config = migrated_config(about["config"], source)
    checkpoint["predictor"] = about | {"format_version": FORMAT_VERSION, "config": config}
    checkpoint["state_dict"] = migrated_state(state, "predictor.")
