"""The backbone: any Hugging Face causal language model, both the teacher and the frozen base of the student.

It is loaded from the package, the hub, a local folder or a GGUF file, or built with random weights from a configuration
(to train a small teacher).
"""

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ptp_lightning.models.attention.eager_attention import needs_eager_attention
from ptp_lightning.models.positions import max_positions
from ptp_lightning.utils.pretrained import EMBEDDED, PATH_KEY, clear_errors, few, listing, locate, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FROM_CONFIG_KEY = "predictor.backbone.from_config"
FINGERPRINT_SAMPLES_PER_TENSOR = 2048
MAX_LAYERS = 4096  # of a stored configuration
# older names that transformers still translates; not reported as misspelt
LEGACY_CONFIG_KEYS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "torch_dtype"})


@dataclass(frozen=True)
class BackboneSettings:
    """Where the base model of a predictor comes from, and its dtype.

    Args:
        path: "embedded" (the small teacher shipped with the package), a local folder with `config.json` and weights, a
            `.gguf` file, or a model id of the Hugging Face hub. The tokenizer comes from here as well.
        dtype: Of the weights.
        revision: Branch, tag or commit of a hub id.
        from_config: Build a fresh model with random weights from this transformers configuration instead of loading
            one, e.g. {"model_type": "llama", "hidden_size": 192}; `path` then only gives the tokenizer.
        random_weights: Use the configuration at `path` with random weights.

    Raises:
        ValueError: A value is outside its range, or `from_config` has no `model_type`.
    """

    path: str = EMBEDDED
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None
    from_config: dict[str, Any] | None = None
    random_weights: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"{PATH_KEY} is empty; expected '{EMBEDDED}', a hub id, a folder or a .gguf file")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"predictor.backbone.dtype must be float32 or bfloat16, found '{self.dtype}'")
        if self.from_config is not None and "model_type" not in self.from_config:
            raise ValueError(f"{FROM_CONFIG_KEY} needs a model_type such as 'llama', found {sorted(self.from_config)}")


def require_memory(settings: BackboneSettings) -> None:
    """Refuse a model with random weights that no memory of this machine holds, before it is built.

    Raises:
        ValueError: names the key and the size.
    """
    entries = settings.from_config
    if entries is None or not hasattr(os, "sysconf"):  # which Windows has not
        return
    for name, value in entries.items():  # transformers makes lists of the types of layers
        if "layer" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise ValueError(f"expected {FROM_CONFIG_KEY}.{name} <= {MAX_LAYERS}, found {value}")
    with torch.device("meta"):
        model = random_model(_config_from_dict(entries), getattr(torch, settings.dtype))
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"expected a model of {FROM_CONFIG_KEY} that memory holds, {there / 1e9:.0f} GB, found one of "
            f"{needed / 1e9:.3g} GB"
        )


def load_backbone(settings: BackboneSettings, *, key: str = PATH_KEY) -> "PreTrainedModel":
    """Load or build the model, in eval mode with SDPA or eager attention and every parameter trainable.

    Args:
        settings: Where it comes from. Local paths never touch the network.
        key: The configuration key of its path, for error messages.

    Raises:
        FileNotFoundError: The folder, the file, or its configuration or weights do not exist.
        ValueError: The files do not hold a complete causal language model.
        ImportError: A `.gguf` file needs the package `gguf`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, settings.dtype)
    if settings.from_config is not None:
        return random_model(_config_from_dict(settings.from_config), dtype)
    source = locate(settings.path, revision=settings.revision, key=key)
    is_local = "local_files_only" in source
    if is_local and "gguf_file" not in source:
        _require_model_files(Path(source["pretrained_model_name_or_path"]), key, weights=not settings.random_weights)

    if not settings.random_weights and "gguf_file" not in source:
        with clear_errors(settings.path, key), quiet_transformers(progress_bar=not is_local):
            config = AutoConfig.from_pretrained(**source)
        _require_plain_weights(config, key)

    def build(attn_implementation: str) -> Any:
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        with clear_errors(settings.path, key), quiet_transformers(progress_bar=not is_local):
            if settings.random_weights:
                config = AutoConfig.from_pretrained(**source)
                _drop_quantization(config)
                return AutoModelForCausalLM.from_config(config, **options)
            return AutoModelForCausalLM.from_pretrained(**source, **options, output_loading_info=True)

    loaded = _with_attention(build)
    if settings.random_weights:
        return loaded.eval()
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{key}={settings.path}: weights are missing for {few(report['missing_keys'])}")
    if report["unexpected_keys"]:
        warnings.warn(f"{settings.path}: unused weights: {few(report['unexpected_keys'])}", stacklevel=2)
    return _dequantized(model, dtype) if "gguf_file" in source else model.eval()


def known_positions(settings: BackboneSettings, *, key: str = PATH_KEY) -> int | None:
    """The longest sequence that the model supports, where a folder says so without its weights; else None.

    Nothing is downloaded. Arguments and errors as in `load_backbone`.
    """
    from transformers import AutoConfig

    source = locate(settings.path, revision=settings.revision, key=key)
    if settings.from_config is not None or "local_files_only" not in source or "gguf_file" in source:
        return None
    _require_model_files(Path(source["pretrained_model_name_or_path"]), key, weights=not settings.random_weights)
    with clear_errors(settings.path, key), quiet_transformers(progress_bar=False):
        return max_positions(AutoConfig.from_pretrained(**source))


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's base weights (hexadecimal sha256), to detect the checkpoint of another base model.

    It covers the configuration's essentials and, of every tensor, name, shape and up to 4095 values at a fixed
    stride. Values are rounded to bfloat16 first, so that the float32 and the bfloat16 copy of a model agree. Adapters
    that PEFT added do not count. Take it before the parameters are sharded.

    Args:
        model: A transformers model or the `PeftModel` around it.
    """
    return _digest(model, weights=True)


def architecture_fingerprint(model: nn.Module) -> str:
    """As `fingerprint`, without the values of the weights: the identity of an architecture."""
    return _digest(model, weights=False)


def _digest(model: nn.Module, *, weights: bool) -> str:
    config: PreTrainedConfig = model.config.get_text_config()  # pyright: ignore[reportCallIssue,reportAttributeAccessIssue]
    essentials = (config.model_type, config.vocab_size, config.hidden_size, config.num_hidden_layers)
    digest = hashlib.sha256(repr(essentials).encode())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        base_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        digest.update(f"{base_name} {list(parameter.shape)}".encode())
        if weights:
            digest.update(_sampled_bytes(parameter.detach()))
    return digest.hexdigest()


def _sampled_bytes(tensor: Tensor) -> bytes:
    # an odd stride walks through all columns of the usual even-sized matrices
    stride = (tensor.numel() // FINGERPRINT_SAMPLES_PER_TENSOR) | 1
    sample = tensor.reshape(-1)[::stride].to(torch.bfloat16)
    return sample.cpu().view(torch.int16).numpy().tobytes()


def _require_model_files(folder: Path, key: str, *, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        hint = " (or to the .gguf file itself)" if any(folder.glob("*.gguf")) else ""
        raise FileNotFoundError(f"expected config.json in {folder}, found {listing(folder)}: set {key}{hint}")
    if weights and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"expected *.safetensors weights in {folder}, found {listing(folder)}: set {key}")


def _require_plain_weights(config: "PreTrainedConfig", key: str) -> None:
    """Refuse quantised weights, which carry no adapter of ours, before transformers asks for a library that reads them.

    Some of them transformers would unpack and train on without a word, others need a GPU.

    Raises:
        ValueError: names the type of the model and the method.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    entries = found if isinstance(found, dict) else found.to_dict()
    method = getattr(entries.get("quant_method"), "value", entries.get("quant_method")) or "an unknown method"
    raise ValueError(
        f"expected a base model with plain weights, found {config.model_type} with weights quantised by {method} "
        f"(quantization_config in config.json): set {key} to the model in float32, float16 or bfloat16 from which it "
        "was made, or to a GGUF file"
    )


def _config_from_dict(entries: dict[str, Any]) -> "PreTrainedConfig":
    """A transformers configuration; unlike transformers, refuses keys that the model type does not know."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**entries)
    except Exception as error:  # transformers validates field types with exceptions of its own
        raise ValueError(f"{FROM_CONFIG_KEY}: {error}") from error
    known = {"model_type"} | {entry.name for entry in fields(config)} | set(config.attribute_map) | LEGACY_CONFIG_KEYS
    if unknown := sorted(set(entries) - known):
        raise ValueError(f"{FROM_CONFIG_KEY}: a {entries['model_type']} configuration has no {unknown}")
    return config


def random_model(config: "PreTrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """A model with random weights, in eval mode with SDPA, or with eager attention if it has none."""
    from transformers import AutoModelForCausalLM

    def build(attn_implementation: str) -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)

    return _with_attention(build).eval()


def _with_attention(build: Callable[[str], Any]) -> Any:
    """What `build` makes with SDPA, or with eager attention where we support a model without SDPA.

    Raises:
        ValueError: another model without SDPA attention, by its name, where transformers asks to open an issue.
    """
    import transformers

    try:
        return build("sdpa")
    except ValueError as error:
        found = re.search(r"(\w+) does not support .*scaled_dot_product_attention", str(error))
        if found is None:
            raise
        model_class = getattr(transformers, found[1], None)
        if model_class is not None and needs_eager_attention(model_class):
            return build("eager")
        raise ValueError(
            f"expected a model with SDPA attention, found {found[1]} without: this type of model is not supported, set "
            f"{PATH_KEY} to another model"
        ) from error


def _dequantized(model: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A plain copy of a model read from GGUF, whose configuration says quantized, so that it cannot be saved."""
    _drop_quantization(model.config)
    plain = random_model(model.config, dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def _drop_quantization(config: "PreTrainedConfig") -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
