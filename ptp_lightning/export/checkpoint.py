"""Networks of stored predictors, and predictors to disk; what must belong together before weights are loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptp_lightning.export.migrations import (
    CHECKPOINT_KEY,
    FORMAT_VERSION,
)
from ptp_lightning.export.model_card import model_card
from ptp_lightning.export.other_base import (
    BASE_KEY,
    require_same_shapes,
    require_same_tokenizer,
    warn_of_other_weights,
)
from ptp_lightning.export.packaged_adapters import (
    SETTINGS_FILE,
)
from ptp_lightning.export.stored_predictor import (
    ADAPTER_NAME,
    ADAPTER_PREFIX,
    CARD_FILE,
    EXPORTED_FILES,
    SLOT_ENCODER_FILE,
    SLOT_ENCODER_PREFIX,
    StoredPredictor,
    read_predictor,
    with_prefix,
)
from ptp_lightning.export.stored_sizes import require_stored_sizes
from ptp_lightning.models.backbone import BackboneSettings, known_positions, load_backbone, require_memory
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.stored_state import TOKEN_RANKS
from ptp_lightning.models.students import GatedLoraStudent
from ptp_lightning.option_names import DTYPES, DtypeName
from ptp_lightning.utils.atomic_files import replacing
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.pretrained import PATH_KEY, listing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


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
        require_memory(config.backbone)
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
            _save_adapter(predictor, with_prefix(state, ADAPTER_PREFIX), draft)
        save_file(with_prefix(state, SLOT_ENCODER_PREFIX), draft / SLOT_ENCODER_FILE)
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


def _package_version() -> str:
    try:
        return version("ptp_lightning")
    except PackageNotFoundError:  # run from a source folder
        return "unknown"
