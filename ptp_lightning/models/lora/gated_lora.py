"""Gated LoRA: low-rank adapters that act on auxiliary slots only (Draxler et al., ICLR 2026).

Context positions run the unchanged base weights, bit for bit, so that one forward pass yields the teacher's
distributions and the student's proposals, and both share one KV cache. PEFT owns the adapter weights and their files;
this module only decides, for every token position, whether they act.
"""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ptp_lightning.models.layers.mixed_in import MixedIn, mix_in
from ptp_lightning.models.lora.fused_lora import AdaptedWeights, adapted_linear, adapted_unit
from ptp_lightning.models.lora.gate import Gate

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """Size and place of the low-rank adapter.

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
        if self.rank < 1:
            raise ValueError(f"predictor.lora.rank must be at least 1, found {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"predictor.lora.alpha must be positive, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"predictor.lora.dropout must lie in [0, 1), found {self.dropout}")
        if not self.target_modules:
            raise ValueError(f"predictor.lora.target_modules must name at least one module, e.g. '{ALL_LINEAR}'")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"predictor.lora.rank_pattern['{pattern}'] must be at least 1, found {rank}")


def _refuse_merge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> NoReturn:
    raise ValueError(
        f"adapter '{active_adapter}' is gated and cannot be merged: merged weights would act on context positions and "
        "change the base model. Keep the adapter, or call unload() to get the base model back."
    )


class GatedLoraVariant(LoraVariant):
    """What PEFT calls instead of its own LoRA forward; one per adapted layer, all sharing one gate."""

    def __init__(self, gate: Gate, layer_name: str) -> None:
        self.gate = gate
        self.layer_name = layer_name

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object) -> Tensor:
        """Add the low-rank term of `x` to `result` where the gate is open.

        Args:
            module: The adapted layer.
            active_adapter: PEFT's name of the adapter.
            x: Input of the layer [B, T, features] (with a mask or a fully open gate also [B * T, features]).
            result: Fresh output of the base layer, which no backward formula needs; may be changed in place.
            **kwargs: Arguments of other PEFT variants.

        Returns:
            The output of `result`'s shape and dtype, bit-identical to it where the gate is closed.
        """
        opening = self.gate.opening
        if opening is None:
            return result
        if opening.mask is not None:
            open_positions = self._fit_mask(opening.mask, x)
            opened = (result + _low_rank_term(module, active_adapter, x)).to(result.dtype)
            return torch.where(open_positions, opened, result)
        if opening.suffix is not None:
            start = self._suffix_start(opening.suffix, x)
            # contiguous: for a strided input torch picks the kernel by whether the weights require gradients
            open_x = x.narrow(1, start, opening.suffix).contiguous()
            term = _low_rank_term(module, active_adapter, open_x)
            result.narrow(1, start, opening.suffix).add_(term)  # in place: closed positions are not even copied
            return result
        return (result + _low_rank_term(module, active_adapter, x)).to(result.dtype)

    def _fit_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """The mask with one entry per token of `x`, broadcasting over features."""
        if x.shape[:-1] == mask.shape:
            return mask.unsqueeze(-1)
        if x.ndim == 2 and len(x) == mask.numel():  # some layers flatten rows and positions
            return mask.reshape(-1, 1)
        raise ValueError(
            f"gate mask {list(mask.shape)} (rows, positions) does not fit the input {list(x.shape)} of layer "
            f"{self.layer_name}; open the gate with the mask of this very call, or leave layers that do not see all "
            "positions out of predictor.lora.target_modules"
        )

    def _suffix_start(self, suffix: int, x: Tensor) -> int:
        if x.ndim != 3 or x.shape[1] < suffix:
            raise ValueError(
                f"gate suffix of {suffix} positions does not fit the input {list(x.shape)} of layer {self.layer_name}, "
                f"expected [rows, positions >= {suffix}, features]; open the gate with a mask, or leave layers that do "
                "not see all positions out of predictor.lora.target_modules"
            )
        return x.shape[1] - suffix

    merge_safe = merge_unsafe = unmerge = staticmethod(_refuse_merge)


def add_gated_lora(
    model: PreTrainedModel, settings: LoraSettings, adapter_name: str = "default"
) -> tuple[PeftModel, Gate]:
    """Freeze a base model and add a gated adapter to it, with PEFT's initialisation (the adapter changes nothing yet).

    Args:
        model: The base model; its layers are wrapped in place.
        settings: Size and place of the adapter.
        adapter_name: PEFT's name of the adapter.

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
        target_modules=settings.target_modules,
        rank_pattern=dict(settings.rank_pattern),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT settles it per layer
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # asked by PEFT
            peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name=adapter_name))
    except ValueError as error:
        raise ValueError(f"predictor.lora.target_modules={settings.target_modules!r}: {error}") from error
    return peft_model.train(training), attach_gate(peft_model)


def attach_gate(peft_model: PeftModel) -> Gate:
    """Put every LoRA layer of a model behind one gate; needed after `PeftModel.from_pretrained`.

    Calling it again returns the same gate and also covers adapters that were added in between.

    Raises:
        ValueError: There is no LoRA layer, or one that cannot be gated.
    """
    layers = {name: layer for name, layer in peft_model.named_modules() if isinstance(layer, LoraLayer)}
    if not layers:
        raise ValueError("expected a model with LoRA layers, found none; check predictor.lora.target_modules")
    variants = [variant for layer in layers.values() for variant in layer.lora_variant.values()]
    gates = [variant.gate for variant in variants if isinstance(variant, GatedLoraVariant)]
    gate = gates[0] if gates else Gate()
    output_head = cast(PreTrainedModel, peft_model.get_base_model()).get_output_embeddings()
    for name, layer in layers.items():
        _check_gateable(name, layer, output_head)
        # PEFT would cast the whole input to the adapter's dtype; the variant casts the open positions only
        layer.cast_input_dtype_enabled = False
        for adapter_name in layer.lora_A:
            layer.lora_variant[adapter_name] = GatedLoraVariant(gate, name)
        _put_behind(cast(nn.Module, layer), _GatedLayer, gate)
    _attach_gated_units(peft_model, gate)
    return gate


class _Behind(MixedIn):
    """Mixed into the class of a module whose `forward` asks the gate.

    Attributes:
        opened_by: the gate.
    """

    opened_by: Gate


class _GatedLayer(_Behind):
    """An adapted layer, without PEFT's way to what it computes where that is not needed.

    The way costs more than the layer itself where a call has few tokens, as in decoding: most of the difference between
    a model with an adapter and one without is saved while the gate is closed, half of the low-rank term's time while it
    is open for the last positions and nothing is trained.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., features in]` to `[..., features out]`."""
        opening = self.opened_by.opening
        modules = self._modules  # its own attributes are found sooner than a module's parts
        is_plain = not (args or kwargs) and len(self.lora_variant) == len(self.scaling)  # all adapters are gated
        if is_plain and opening is None:
            return modules["base_layer"](x)
        if is_plain and opening is not None and opening.is_everywhere and _keeps_little():
            weights = _trained_weights(self, x.device.type)
            if weights is not None:
                return adapted_linear(x, weights)
        if is_plain and opening is not None and opening.suffix and not torch.is_grad_enabled():
            adapters, shape = self.active_adapters, x.shape
            if len(adapters) == 1 and not self.disable_adapters and len(shape) == 3 and shape[1] >= opening.suffix:
                adapter = adapters[0]
                parts = (modules[part]._modules[adapter] for part in ("lora_A", "lora_B", "lora_dropout"))
                lora_a, lora_b, dropout = parts
                lora_a, lora_b = lora_a._parameters["weight"], lora_b._parameters["weight"]
                if lora_a.dtype == x.dtype and (isinstance(dropout, nn.Identity) or not dropout.training):
                    result = modules["base_layer"](x)
                    start = shape[1] - opening.suffix
                    # contiguous: see GatedLoraVariant.forward
                    reduced = nn.functional.linear(x[:, start:].contiguous(), lora_a)
                    # product and sum at once, in place
                    if shape[0] == 1:
                        result[0, start:].addmm_(reduced[0], lora_b.t(), alpha=self.scaling[adapter])
                    else:
                        weights = lora_b.t().expand(shape[0], -1, -1)
                        result[:, start:].baddbmm_(reduced, weights, alpha=self.scaling[adapter])
                    return result
        return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class _GatedUnit(_Behind):
    """`down(act(gate(x)) * up(x))`, see `adapted_unit`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        opening = self.opened_by.opening
        if opening is not None and opening.is_everywhere and _keeps_little():
            layers = self.gate_proj, self.up_proj, self.down_proj
            found = [_unit_weights(layer, x.device.type) for layer in layers]
            weights = [one for one in found if one is not None]
            if len(weights) == len(layers):
                return adapted_unit(x, self.act_fn, *weights)
        return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]


def _unit_weights(layer: nn.Module, device: str) -> AdaptedWeights | None:
    """As `_trained_weights`; none of a layer that has no adapter, or lost it, or has more than gated ones."""
    if not isinstance(layer, LoraLayer) or len(layer.lora_variant) != len(layer.scaling):
        return None
    return _trained_weights(layer, device)


def _put_behind(module: nn.Module, kind: type[_Behind], gate: Gate) -> None:
    mix_in(module, kind)
    cast(Any, module).opened_by = gate


def _keeps_little() -> bool:
    """Whether what autograd keeps is up to this package; a compiler finds out itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _trained_weights(layer: LoraLayer, device: str) -> AdaptedWeights | None:
    """The weights with which `adapted_linear` does what PEFT would do; None where it would do anything else.

    Under autocast on this kind of device they are in its dtype, as linear layers have them there.
    """
    base, adapters = layer.get_base_layer(), layer.active_adapters
    if type(base) is not nn.Linear or len(adapters) != 1 or layer.disable_adapters or base.weight.requires_grad:
        return None
    dropout = layer.lora_dropout[adapters[0]]
    if dropout.training and not isinstance(dropout, nn.Identity):
        return None
    lora_a, lora_b = (cast(nn.Linear, part[adapters[0]]).weight for part in (layer.lora_A, layer.lora_B))
    weights = AdaptedWeights(base.weight, base.bias, lora_a, lora_b, layer.scaling[adapters[0]])
    return weights.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weights


def _attach_gated_units(model: nn.Module, gate: Gate) -> None:
    """Let MLPs of Llama and its kin keep less for the backward pass, see `adapted_unit`.

    Whether one with such parts computes just `down(act(gate(x)) * up(x))` is tried out, for its class is not known.
    """
    for module in model.modules():
        parts = {name: module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")}
        down = parts["down_proj"]
        if None in parts.values() or not isinstance(down, LoraLayer) or not _is_gated_unit(module):
            continue
        _put_behind(module, _GatedUnit, gate)


@torch.no_grad()
def _is_gated_unit(module: Any) -> bool:
    weight = module.down_proj.get_base_layer().weight
    width = getattr(module.gate_proj, "in_features", None)
    if width is None:
        return False
    x = torch.linspace(-1, 1, width, dtype=weight.dtype, device=weight.device).view(1, 1, width)
    expected = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
    return torch.equal(type(module).forward(module, x), expected)


def _low_rank_term(module: LoraLayer, adapter_name: str, x: Tensor) -> Tensor:
    """`alpha / r * B A x` in the adapter's dtype; [..., features in] -> [..., features out]."""
    lora_a = cast(nn.Linear, module.lora_A[adapter_name])
    x = module.lora_dropout[adapter_name](x.to(lora_a.weight.dtype))
    return module.lora_B[adapter_name](lora_a(x)) * module.scaling[adapter_name]


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


def _check_gateable(name: str, layer: LoraLayer, output_head: nn.Module | None) -> None:
    base_layer = layer.get_base_layer()
    cure = "leave it out of predictor.lora.target_modules"
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        raise ValueError(f"{name} is a {type(base_layer).__name__}, only linear layers can be gated; {cure}")
    if layer is output_head:
        # `logits_to_keep` shows the head a selection of positions, so the gate could not tell which they are
        raise ValueError(f"{name} is the output head and cannot be gated; {cure}")
    if any(not isinstance(variant, GatedLoraVariant) for variant in layer.lora_variant.values()):
        raise ValueError(f"{name} uses another LoRA variant (such as DoRA); only plain LoRA can be gated")
