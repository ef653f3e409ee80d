"""Stored predictors: what checkpoints and exported folders are made of, and how they are read.

An exported folder is a standard PEFT adapter with two more files: the slot encoder's weights, and `predictor.json`,
which holds all settings and the base model's fingerprint. Base weights are in neither. With slots that run through no
layer there is no adapter, and these two files are all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptp_lightning.export.hub import download, hub_id
from ptp_lightning.export.migrations import (
    CHECKPOINT_KEY,
    migrate_checkpoint,
    migrated_config,
    migrated_state,
    require_known_format,
)
from ptp_lightning.export.packaged_adapters import (
    DEFAULT_ADAPTER,
    PACKAGED_ADAPTERS,
    SETTINGS_FILE,
    packaged_adapter_folder,
)
from ptp_lightning.utils.local_paths import local_path
from ptp_lightning.utils.pretrained import HUB_ADVICE, clear_errors, few, listing, require_torch_file

ADAPTER_NAME = "default"
PREDICTOR_FOLDER = "predictor"  # of an export that brings its base model

SLOT_ENCODER_FILE = "slot_encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
EXPORTED_FILES = ("adapter_config.json", ADAPTER_FILE, SLOT_ENCODER_FILE, SETTINGS_FILE, CARD_FILE)

ADAPTER_PREFIX = "language_model."  # names in PredictorNetwork.trainable_state
SLOT_ENCODER_PREFIX = "slot_encoder."
STORED_KINDS: dict[str, type] = {"config": dict, "base_fingerprint": str}
"""Entries that both forms have."""


class StoredPredictor(NamedTuple):
    """Content of a checkpoint or an exported folder, before a network is built.

    Attributes:
        path: of the file or folder.
        config: plain data of a `PredictorConfig`.
        base_fingerprint: of its base model.
        state: names and values as in `PredictorNetwork.trainable_state`.
        training: facts about the training: `steps`, `prefix_counts` as in `PredictorNetwork`, and metrics by tag.
    """

    path: Path
    config: dict[str, Any]
    base_fingerprint: str
    state: dict[str, Tensor]
    training: dict[str, Any]


def read_predictor(path: str | Path | None = None) -> StoredPredictor:
    """Read what `load_network` needs; arguments and errors as there, without those about the base model."""
    path = DEFAULT_ADAPTER if path is None else path
    is_packaged = path in PACKAGED_ADAPTERS
    target = packaged_adapter_folder(str(path)) if is_packaged else local_path(path, CHECKPOINT_KEY, HUB_ADVICE)
    if target.is_file():
        return _read_checkpoint(target)
    if target.is_dir():
        return _read_exported(target, {"path": str(target)})
    if (source := hub_id(path)) is not None:
        folder = download(source, [*EXPORTED_FILES, *(f"{PREDICTOR_FOLDER}/{name}" for name in EXPORTED_FILES)])
        return _read_exported(folder, {"path": source.repo, "revision": folder.name})
    raise FileNotFoundError(
        f"expected a Lightning checkpoint or an exported folder at {target}, found nothing: set {CHECKPOINT_KEY}, or "
        f"model to the name of a packaged adapter ({', '.join(PACKAGED_ADAPTERS)})"
    )


def _read_checkpoint(file: Path) -> StoredPredictor:
    require_torch_file(file, CHECKPOINT_KEY)
    with clear_errors(file, CHECKPOINT_KEY):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    migrate_checkpoint(checkpoint, str(file))
    about = checkpoint["predictor"]
    _require_kinds(about, STORED_KINDS, file)
    _require_kinds(checkpoint, {"global_step": int}, file)
    state = with_prefix(checkpoint["state_dict"], "predictor.")
    training: dict[str, Any] = {"steps": checkpoint["global_step"]}
    if "prefix_counts" in about:  # it has been validated
        training["prefix_counts"] = about["prefix_counts"]
    _require_counts(training, file)
    return StoredPredictor(file, about["config"], about["base_fingerprint"], state, training)


def _read_exported(folder: Path, location: dict[str, str]) -> StoredPredictor:
    """An adapter, or a predictor beside its base model, which is then where `location` says."""
    if not (folder / PREDICTOR_FOLDER / SETTINGS_FILE).is_file():
        return _read_folder(folder)
    stored = _read_folder(folder / PREDICTOR_FOLDER)
    backbone = location | {"dtype": stored.config["backbone"]["dtype"]}
    return stored._replace(config={**stored.config, "backbone": backbone})


def _read_folder(folder: Path) -> StoredPredictor:
    _require_file(folder, SETTINGS_FILE)
    with clear_errors(folder / SETTINGS_FILE, CHECKPOINT_KEY):
        about: Any = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    version = about.get("format_version") if isinstance(about, dict) else None
    require_known_format(version, str(folder / SETTINGS_FILE))
    if missing := {"config", "base_fingerprint", "training"} - about.keys():
        raise ValueError(f"expected {few(missing)} in {folder / SETTINGS_FILE}, found {few(about)}: export it again")
    _require_kinds(about, STORED_KINDS | {"training": dict}, folder / SETTINGS_FILE)
    _require_counts(about["training"], folder / SETTINGS_FILE)
    state: dict[str, Tensor] = {}
    weights: dict[str, Callable[[str], str]] = {SLOT_ENCODER_FILE: SLOT_ENCODER_PREFIX.__add__}
    if about["config"].get("slot_layers") != 0:
        weights[ADAPTER_FILE] = _adapter_name
    for name, in_state in weights.items():
        _require_file(folder, name)
        with clear_errors(folder / name, CHECKPOINT_KEY):
            state |= {in_state(key): value for key, value in load_file(folder / name).items()}
    config = migrated_config(about["config"], str(folder / SETTINGS_FILE))
    return StoredPredictor(folder, config, about["base_fingerprint"], migrated_state(state), about["training"])


def _require_kinds(entries: Mapping[str, Any], kinds: Mapping[str, type], source: Path) -> None:
    for name, kind in kinds.items():
        if not isinstance(entries.get(name), kind):
            raise ValueError(
                f"expected {name} of the kind {kind.__name__} in {source}, found {entries.get(name)!r:.80}: set "
                f"{CHECKPOINT_KEY}"
            )


def _require_counts(training: Mapping[str, Any], source: Path) -> None:
    counts = training.get("prefix_counts")
    if counts is None:
        return
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(
            f"expected prefix_counts as a list of whole numbers in {source}, found {counts!r:.80}: set {CHECKPOINT_KEY}"
        )


def _require_file(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"expected {name} in {folder}, found {listing(folder)}: set {CHECKPOINT_KEY}")


def _adapter_name(stored: str) -> str:
    """PEFT leaves the adapter's name out of the names of weights: `..lora_A.weight` is `..lora_A.default.weight`."""
    module, _, parameter = stored.rpartition(".")
    return f"{ADAPTER_PREFIX}{module}.{ADAPTER_NAME}.{parameter}"


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights whose names begin with `prefix`, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
