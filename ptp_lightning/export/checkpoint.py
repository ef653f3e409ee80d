"""Predictors on disk: Lightning checkpoints and exported folders, and checks before their weights are loaded.

An exported folder is a standard PEFT adapter with two more files: the slot encoder's weights, and `predictor.json`,
which holds all settings and the base model's fingerprint. Base weights are in neither. With slots that run through no
layer there is no adapter, and these two files are all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptp_lightning.export.hub import download, hub_id
from ptp_lightning.export.migrations import (
    CHECKPOINT_KEY,
    FORMAT_VERSION,
    migrate_checkpoint,
    migrated_config,
    migrated_state,
    require_known_format,
)
from ptp_lightning.export.model_card import model_card
from ptp_lightning.export.other_base import (
    BASE_KEY,
    require_same_shapes,
    require_same_tokenizer,
    warn_of_other_weights,
)
from ptp_lightning.export.packaged_adapters import (
    DEFAULT_ADAPTER,
    PACKAGED_ADAPTERS,
    SETTINGS_FILE,
    packaged_adapter_folder,
)
from ptp_lightning.export.stored_sizes import require_stored_sizes
from ptp_lightning.models.backbone import BackboneSettings, known_positions, load_backbone
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.stored_state import TOKEN_RANKS
from ptp_lightning.models.students import GatedLoraStudent
from ptp_lightning.option_names import DTYPES, DtypeName
from ptp_lightning.utils.atomic_files import replacing
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.pretrained import HUB_ADVICE, PATH_KEY, clear_errors, few, listing, require_torch_file

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"
PREDICTOR_FOLDER = "predictor"  # of an export that brings its base model

SLOT_ENCODER_FILE = "slot_encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
EXPORTED_FILES = ("adapter_config.json", ADAPTER_FILE, SLOT_ENCODER_FILE, SETTINGS_FILE, CARD_FILE)

ADAPTER_PREFIX = "language_model."  # names in PredictorNetwork.trainable_state
SLOT_ENCODER_PREFIX = "slot_encoder."


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


def load_network(
    path: str | Path | None = None,
    *,
    dtype: DtypeName | torch.dtype = "auto",
    base: str | Path | None = None,
    trust_custom_classes: bool = False,
) -> PredictorNetwork:
    """A trained predictor in eval mode, on the CPU.

    Args:
        path: a Lightning checkpoint of a module that trains a predictor, an exported folder, a repository of the
            Hugging Face hub ("user/name" or "user/name@revision"), or the name of an adapter that ships with the
            package (`PACKAGED_ADAPTERS`), by default "code".
        dtype: of the base model's weights, "float32" or "bfloat16"; "auto" is that of the training.
        base: a folder, a GGUF file or an id of the hub in place of the stored path of the base model: the same model
            elsewhere, or a sibling such as a fine-tune. Architecture, sizes and tokenizer must be those of the
            adapter's own base model. Other weights are a warning, because drafts may then be worse.
        trust_custom_classes: let the stored configuration name classes outside of this package. Their import runs
            their code.

    Raises:
        FileNotFoundError: a file of the predictor or of its base model is missing.
        ValueError: an argument is out of range, a file cannot be read, or weights, settings and base model do not
            belong together.
    """
    return build_network(read_predictor(path), dtype=dtype, base=base, trust_custom_classes=trust_custom_classes)


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


def build_network(
    stored: StoredPredictor,
    *,
    dtype: DtypeName | torch.dtype = "auto",
    base: str | Path | None = None,
    trust_custom_classes: bool = False,
    model: PreTrainedModel | None = None,
) -> PredictorNetwork:
    """Build the network of a stored predictor; other arguments and errors as in `load_network`.

    A `model` that is already loaded is used as the base model: its linear layers get the adapter.
    """
    config = _stored_config(stored, trust_custom_classes=trust_custom_classes)
    trained_with = config.backbone
    config = replace(config, backbone=_backbone(config, dtype, base))
    if model is None:
        model = load_backbone(config.backbone, key=BASE_KEY)
    try:
        predictor = PredictorNetwork(config, model, token_ranks=_stored_order(stored, config))
    except ValueError as error:
        if base is None:
            raise
        raise ValueError(f"the adapter {stored.path} does not fit {base}: {error}: set {BASE_KEY}") from error
    if base is not None:
        require_same_shapes(predictor.trainable_state(), stored.state, str(base))
    if predictor.base_fingerprint != stored.base_fingerprint:
        if base is None:
            raise ValueError(
                f"expected the base model that {stored.path} was trained on (fingerprint "
                f"{stored.base_fingerprint[:12]}), found another base model at {config.backbone.path!r} "
                f"({predictor.base_fingerprint[:12]}): set {BASE_KEY} to where the former is, or to this one to use "
                "the adapter on it all the same"
            )
        same_tokenizer = require_same_tokenizer(trained_with, config.backbone)
        warn_of_other_weights(
            str(stored.path),
            stored.base_fingerprint,
            str(base),
            predictor.base_fingerprint,
            same_tokenizer=same_tokenizer,
        )
    try:
        predictor.load_trainable_state(stored.state)
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from error
    predictor.prefix_counts = stored.training.get("prefix_counts")
    return predictor.eval()


def stored_positions(
    stored: StoredPredictor,
    *,
    dtype: DtypeName | torch.dtype = "auto",
    base: str | Path | None = None,
    trust_custom_classes: bool = False,
) -> int | None:
    """The longest sequence of the base model, see `known_positions`; arguments and errors as in `build_network`."""
    config = _stored_config(stored, trust_custom_classes=trust_custom_classes)
    return known_positions(_backbone(config, dtype, base), key=BASE_KEY)


def _stored_config(stored: StoredPredictor, *, trust_custom_classes: bool) -> PredictorConfig:
    try:
        config = PredictorConfig.from_dict(stored.config, trusted_classes=None if trust_custom_classes else ())
        require_stored_sizes(stored.state, config)
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from error
    return config


def _backbone(config: PredictorConfig, dtype: DtypeName | torch.dtype, base: str | Path | None) -> BackboneSettings:
    """The stored settings of the base model, or those that arguments of `load_network` ask for."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, found {name!r}: set dtype")
    backbone = config.backbone
    if base is not None:
        if config.student.trains_base:
            raise ValueError(
                f"expected {BASE_KEY} for an adapter, found {type(config.student).__name__}, which has trained its "
                f"base model: leave {BASE_KEY} out"
            )
        backbone = BackboneSettings(path=str(base), dtype=backbone.dtype)
    return backbone if name == "auto" else replace(backbone, dtype=cast("Any", name))


def save_network(
    predictor: PredictorNetwork,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    training: dict[str, Any] | None = None,
    license: str | None = None,
    name: str | None = None,
) -> None:
    """Write adapter, slot encoder, settings and model card; the folder appears complete or not at all.

    Args:
        predictor: the network.
        folder: the folder to create.
        dtype: of the weights on disk, by default their own; they are converted to float32 when loaded.
        overwrite: replace an earlier export.
        training: facts for `predictor.json` and the model card, see `StoredPredictor`.
        license: for the model card, as the hub names it, "apache-2.0" for instance.
        name: for the model card, by default that of the folder.

    Raises:
        ValueError: the folder is not free, see `require_free_folder`, or the student has no adapter.
    """
    _require_adapter(predictor.config)
    target = require_free_folder(folder, overwrite=overwrite)
    state = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in predictor.trainable_state().items()
    }
    about = {
        "format_version": FORMAT_VERSION,
        "package_version": _package_version(),
        "config": predictor.config.to_dict(),
        "base_fingerprint": predictor.base_fingerprint,
        "training": training or {},
    }
    with replacing(target) as draft:
        if predictor.config.has_lora:
            _save_adapter(predictor, _with_prefix(state, ADAPTER_PREFIX), draft)
        save_file(_with_prefix(state, SLOT_ENCODER_PREFIX), draft / SLOT_ENCODER_FILE)
        (draft / SETTINGS_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        card = model_card(predictor.config, predictor.base_fingerprint, name or target.name, training or {}, license)
        (draft / CARD_FILE).write_text(card, encoding="utf-8")  # instead of PEFT's
        for file in draft.iterdir():  # safetensors writes files that nobody else may read
            file.chmod((draft / SETTINGS_FILE).stat().st_mode)


def require_free_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that is new, empty, or an earlier export that may be overwritten.

    Raises:
        ValueError: something else is there, or an earlier export and `overwrite` is false.
    """
    target = local_path(folder, "output", WRITTEN).resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"expected a folder to write to, found the file {target}: set output")
    found = {entry.name for entry in target.iterdir()}
    if found and not overwrite:
        raise ValueError(f"expected {target} to be new or empty, found {listing(target)}: set output or set overwrite")
    if found - set(EXPORTED_FILES):  # an overwritten folder is deleted, so it must hold nothing else
        raise ValueError(f"expected nothing but an earlier export in {target}, found {listing(target)}: set output")
    return target


def require_same_predictor(checkpoint: dict[str, Any], predictor: PredictorNetwork) -> None:
    """Refuse weights that were trained for another base model or other sampling settings.

    Args:
        checkpoint: of this version, see `migrate_checkpoint`; has the entry `predictor`.
        predictor: the network that is to take the weights.

    Raises:
        ValueError: what differs, and the key to set.
    """
    stored = checkpoint["predictor"]
    if stored["base_fingerprint"] != predictor.base_fingerprint:
        raise ValueError(
            f"expected a checkpoint for the base model {predictor.config.backbone.path!r}, found one trained on other "
            f"base weights ({stored['config']['backbone']['path']!r}): set {PATH_KEY} or {CHECKPOINT_KEY}"
        )
    own = predictor.config
    trained = PredictorConfig.from_dict(stored["config"], trusted_classes=own.class_paths())
    if type(trained.objective) is not type(own.objective):  # settings of its drafts may change after training
        raise ValueError(
            f"expected predictor.objective as configured, {own.objective}, found a checkpoint trained with "
            f"{trained.objective}: change predictor.objective to the checkpoint's, or train again"
        )
    for key in ("student", "sampling", "features"):
        if getattr(trained, key) != getattr(own, key):
            raise ValueError(
                f"expected predictor.{key} as configured, {getattr(own, key)}, found a checkpoint trained with "
                f"{getattr(trained, key)}: change predictor.{key} to the checkpoint's, or train again"
            )


def _require_adapter(config: PredictorConfig) -> None:
    if config.student.name != GatedLoraStudent.name:
        raise ValueError(
            f"expected a predictor with an adapter, found {type(config.student).__name__}, whose weights are a whole "
            "network: only predictor.student: GatedLoraStudent is exported; the checkpoint itself serves generate and "
            "from_pretrained"
        )


def _read_checkpoint(file: Path) -> StoredPredictor:
    require_torch_file(file, CHECKPOINT_KEY)
    with clear_errors(file, CHECKPOINT_KEY):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    migrate_checkpoint(checkpoint, str(file))
    about = checkpoint["predictor"]
    state = _with_prefix(checkpoint["state_dict"], "predictor.")
    training: dict[str, Any] = {"steps": checkpoint["global_step"]}
    if "prefix_counts" in about:  # it has been validated
        training["prefix_counts"] = about["prefix_counts"]
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


def _require_file(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"expected {name} in {folder}, found {listing(folder)}: set {CHECKPOINT_KEY}")


def _adapter_name(stored: str) -> str:
    """PEFT leaves the adapter's name out of the names of weights: `..lora_A.weight` is `..lora_A.default.weight`."""
    module, _, parameter = stored.rpartition(".")
    return f"{ADAPTER_PREFIX}{module}.{ADAPTER_NAME}.{parameter}"


def _stored_order(stored: StoredPredictor, config: PredictorConfig) -> Tensor | None:
    """Ranks of the tokens in the order "embedding", which are stored because they are costly to compute."""
    if config.sampling.order != "embedding":
        return None
    if TOKEN_RANKS not in stored.state:
        raise ValueError(
            f"{stored.path}: expected the token order of predictor.sampling.order 'embedding', found none stored: "
            f"set {CHECKPOINT_KEY}"
        )
    return stored.state[TOKEN_RANKS]


def _save_adapter(predictor: PredictorNetwork, state: dict[str, Tensor], folder: Path) -> None:
    model = cast("PeftModel", predictor.language_model)  # see _require_adapter
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = predictor.config.backbone.path
    model.peft_config[ADAPTER_NAME].revision = predictor.config.backbone.revision
    # "auto" would look at the base model's configuration on the hub to decide whether to store embeddings
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER_NAME], save_embedding_layers=False, state_dict=state)


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights whose names begin with `prefix`, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _package_version() -> str:
    try:
        return version("ptp_lightning")
    except PackageNotFoundError:  # run from a source folder
        return "unknown"
