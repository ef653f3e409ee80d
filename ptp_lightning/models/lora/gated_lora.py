"""Gated LoRA: low-rank adapters that act on auxiliary slots only (Draxler et al., ICLR 2026).

Context positions run the unchanged base weights, bit for bit. One forward pass therefore yields the teacher's
distributions and the student's drafts, and both share one KV cache. PEFT owns the adapter's weights and files; the gate
decides at which token positions they act.
"""

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import cast

from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptp_lightning.models.lora.gate import Gate
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear, use_gated_layers
from ptp_lightning.models.lora.gated_mlp import fuse_mlps
from ptp_lightning.models.support import ADVICE, require_packed_rows

ALL_LINEAR = "all-linear"
MAX_RANK = 2**12
"""Larger than any adapter that trains less than the layer itself."""


@dataclass(frozen=True)
class LoraSettings:
    """Size of the low-rank adapter, and which layers carry it.

    Args:
        rank: Rank r of every update `B A`.
        alpha: The update is scaled by `alpha / r`, with each layer's own r.
        dropout: Probability with which an input feature of the update is dropped in training.
        target_modules: "all-linear" (every linear layer except the output head), a list of module name endings such as
            ["q_proj", "v_proj"], or a regular expression for full module names.
        rank_pattern: Ranks that differ from `rank`, by module name ending (a regular expression).

    Raises:
        ValueError: A value lies outside its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"expected predictor.lora.rank in 1 .. {MAX_RANK}, found {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"expected a finite predictor.lora.alpha > 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"predictor.lora.dropout must lie in [0, 1), found {self.dropout}")
        if not self.target_modules:
            raise ValueError(f"predictor.lora.target_modules must name at least one module, e.g. '{ALL_LINEAR}'")
        for pattern, rank in self.rank_pattern.items():
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"expected predictor.lora.rank_pattern['{pattern}'] in 1 .. {MAX_RANK}, found {rank}")


def add_gated_lora(model: PreTrainedModel, settings: LoraSettings, first_layer: int = 0) -> tuple[PeftModel, Gate]:
    """Freeze a base model and add a gated adapter to it, with PEFT's initialisation (the adapter changes nothing yet).

    Args:
        model: The base model; linear layers are replaced by `GatedLoraLinear`, and supported MLPs by `GatedLoraMLP`.
        settings: Size of the adapter, and which layers carry it.
        first_layer: index of the first decoder layer that carries it.

    Returns:
        The PEFT model in the same train / eval mode, with the adapter's parameters (float32 also on a bfloat16 base)
        as the only trainable ones, and the closed gate.

    Raises:
        ValueError: A module pattern matches nothing or matches a layer that cannot be gated.
    """
    if isinstance(model, (PeftModel, PeftMixedModel)) or any(isinstance(layer, LoraLayer) for layer in model.modules()):
        raise ValueError("the base model already holds an adapter; load the plain model at predictor.backbone.path")
    _check_patterns(settings, [name for name, _ in model.named_modules()])
    training = model.training
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  PEFT only divides it by r
        lora_dropout=settings.dropout,
        target_modules=_targets_from(model, settings, first_layer) if first_layer else settings.target_modules,
        rank_pattern=dict(settings.rank_pattern),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        task_type="CAUSAL_LM",
    )
    gate = Gate()
    use_gated_layers(config, gate)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # asked by PEFT
            peft_model = cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise ValueError(f"predictor.lora.target_modules={settings.target_modules!r}: {error}") from error
    _check_gateable(model)
    fuse_mlps(model)
    return peft_model.train(training), gate


def _targets_from(model: PreTrainedModel, settings: LoraSettings, first_layer: int) -> list[str]:
    """Full names of the adapted modules in the decoder layers from one on.

    PEFT's own choice of layers goes with a list of endings alone.
    """
    stack = getattr(model, model.base_model_prefix).layers
    prefix = next(name for name, module in model.named_modules() if module is stack)
    names = [
        f"{prefix}.{index}.{name}"
        for index, layer in enumerate(stack)
        if index >= first_layer
        for name, module in layer.named_modules()
        if _is_target(settings.target_modules, f"{prefix}.{index}.{name}", module)
    ]
    if not names:
        raise ValueError(
            f"expected predictor.lora.target_modules in the last layers, which slots run through, found "
            f"{settings.target_modules!r}: change it, or set predictor.slot_layers to null"
        )
    return names


def _is_target(targets: str | list[str], name: str, module: nn.Module) -> bool:
    if targets == ALL_LINEAR:
        return isinstance(module, nn.Linear | Conv1D)
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in targets)


def _check_patterns(settings: LoraSettings, module_names: list[str]) -> None:
    """PEFT ignores patterns that match nothing as long as one matches; a misspelt one should not go unnoticed."""
    if isinstance(settings.target_modules, str):
        targets = {settings.target_modules: settings.target_modules}
        targets.pop(ALL_LINEAR, None)
    else:
        targets = {ending: rf"(.*\.)?{re.escape(ending)}" for ending in settings.target_modules}
    ranks = {ending: rf"(.*\.)?({ending})" for ending in settings.rank_pattern}
    for key, patterns in {"target_modules": targets, "rank_pattern": ranks}.items():
        for entry, pattern in patterns.items():
            try:
                matches = any([re.fullmatch(pattern, name) for name in module_names])
            except re.error as error:
                raise ValueError(f"predictor.lora.{key}: '{entry}' is not a regular expression ({error})") from error
            if not matches:
                endings = sorted({name.rpartition(".")[2] for name in module_names} - {""})
                names = [ending for ending in endings if not ending.isdigit()]
                raise ValueError(f"predictor.lora.{key}: no module matches '{entry}'; names in this model: {names}")


def _check_gateable(model: PreTrainedModel) -> None:
    output_head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    # `logits_to_keep` shows the head a selection of positions, so the gate could not tell which they are
    refused = [name for name, one in layers.items() if not isinstance(one, GatedLoraLinear) or one is output_head]
    if refused:
        require_packed_rows(model, ADVICE)  # other adapters do not help a model that is refused for itself
        layer = layers[refused[0]]
        kind = "the output head" if layer is output_head else f"a {type(layer.get_base_layer()).__name__}"
        raise ValueError(
            f"expected adapters on linear layers other than the output head, found {refused[0]} of "
            f"{model.config.model_type}, which is {kind}: {_advised_targets(list(layers), refused)}"
        )


def _advised_targets(names: list[str], refused: list[str]) -> str:
    """All adapted layers but those refused and their neighbours, which may belong to a mixture of experts."""
    blocks = {name.rpartition(".")[0] for name in refused} - {""}
    neighbours = {
        name.rpartition(".")[2]
        for name in names
        if name in refused or any(name.startswith(f"{block}.") for block in blocks)
    }
    advised = sorted({name.rpartition(".")[2] for name in names} - neighbours)
    if not advised:
        return "set predictor.lora.target_modules to linear layers, or predictor.backbone.path to another model"
    return f"set predictor.lora.target_modules to [{', '.join(advised)}] or fewer"
