"""GatedLoraLinear: a frozen linear layer whose low-rank update acts where the gate is open."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptp_lightning.models.lora.gate import Gate
from ptp_lightning.models.lora.low_rank import (
    LoraLinearWeights,
    LoraWeights,
    lora_expand_,
    lora_linear,
    lora_shrink,
)


class GatedLoraLinear(Linear):
    """PEFT's LoRA layer with a gate; PEFT builds it in place of its own class, see `use_gated_layers`.

        y = W x + b + s B A x    at open positions
        y = W x + b              at all others, bit-identical to the base layer

    PEFT owns the weights and their files. `forward` is ours, with one method for each state of the gate:

    | gate | method | low-rank term |
    |---|---|---|
    | closed | `forward_base` | none |
    | all positions | `forward_everywhere` | all positions, in training by one fused kernel |
    | suffix | `forward_suffix` | the last positions only, added in place |
    | mask | `forward_masked` | all positions, then a choice between two outputs |

    Args:
        base_layer: an `nn.Linear` or a `Conv1D` of transformers, which stays frozen.
        adapter_name: PEFT's name of the adapter.
        config: PEFT's settings.
        gate: shared by all layers of a model.
        **kwargs: PEFT's further arguments.

    Attributes:
        gate: see above.
        layer_name: the layer's name in the base model, for errors.
    """

    gate: Gate
    layer_name: str

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, *, gate: Gate, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.gate = gate
        self.layer_name = kwargs["target_name"]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, in]` to `[B, T, out]`; with a mask or a gate open everywhere also `[B * T, in]`."""
        state = self.gate.state
        if state is None or self.acting_adapter is None:
            return self.forward_base(x)
        if state.mask is not None:
            return self.forward_masked(x, state.mask)
        if state.suffix is not None:
            return self.forward_suffix(x, state.suffix)
        return self.forward_everywhere(x)

    def forward_base(self, x: Tensor) -> Tensor:
        """The base layer alone, for context positions."""
        return self._modules["base_layer"](x)  # pyright: ignore[reportOptionalCall]  faster than an attribute

    def forward_everywhere(self, x: Tensor) -> Tensor:
        """The update at all positions."""
        weights = self.training_weights(x)
        if weights is not None:
            return lora_linear(x, weights)
        return self._add_update_(self.forward_base(x), x)

    def forward_suffix(self, x: Tensor, suffix: int) -> Tensor:
        """The update at the last `suffix` positions of every row."""
        start = self._suffix_start(x, suffix)
        output = self.forward_base(x)
        # contiguous: for a strided input torch picks the kernel by whether the weights require gradients
        self._add_update_(output.narrow(1, start, suffix), x.narrow(1, start, suffix).contiguous())
        return output

    def forward_masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """The update where `mask` `[B, T]` is true."""
        is_open = self._fitting_mask(x, mask)
        output = self.forward_base(x)
        return torch.where(is_open, self._add_update_(output.clone(), x), output)

    @property
    def acting_adapter(self) -> str | None:
        """The active adapter, if it adapts this layer and adapters are enabled."""
        name = self._active_adapter if isinstance(self._active_adapter, str) else next(iter(self._active_adapter), None)
        return name if name in self.scaling and not self._disable_adapters else None

    @property
    def lora_weights(self) -> LoraWeights:
        """Those of the acting adapter."""
        modules: Any = self._modules  # faster than attributes, which counts in calls of few tokens
        name = self.acting_adapter
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return LoraWeights(a._parameters["weight"], b._parameters["weight"], self.scaling[name])

    def training_weights(self, x: Tensor) -> LoraLinearWeights | None:
        """Weights for the fused kernels of training, or None where they do not compute what this layer does.

        Where they do: gradients are wanted, the gate is open at all positions, the base layer is a plain frozen one and
        no dropout acts. A compiler fuses for itself. Under autocast the weights are in its dtype, as linear layers
        have them there.

        Args:
            x: the layer's input.
        """
        state, base = self.gate.state, self.get_base_layer()
        if state is None or not state.is_everywhere or self.acting_adapter is None:
            return None
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if type(base) is not nn.Linear or base.weight.requires_grad or self._active_dropout is not None:
            return None
        weights = LoraLinearWeights(base.weight, base.bias, self.lora_weights)
        device = x.device.type
        return weights.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weights

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """What PEFT may put in place of the low-rank formula (DoRA and others): nothing, so that it refuses them."""
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; called by PEFT.

        Raises:
            ValueError: the adapter has a bias, or is more than plain LoRA.
        """
        if config.lora_bias:
            raise ValueError("expected an adapter without biases, found lora_bias, which cannot be gated")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapter that acts; called by PEFT.

        Raises:
            ValueError: there are several.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"expected one active adapter, found {adapter_names}; a gated layer adds one update only")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse to merge.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the adapter of {self.layer_name} is gated and cannot be merged: merged weights would act on context "
            "positions and change the base model. Keep the adapter, or call unload() to get the base model back."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into another kind."""
        return False

    @property
    def _active_dropout(self) -> nn.Module | None:
        """None where it does nothing."""
        modules = cast(nn.ModuleDict, self._modules["lora_dropout"])
        dropout = modules[cast(str, self.acting_adapter)] if modules.training else None
        return None if isinstance(dropout, nn.Identity) else dropout

    def _add_update_(self, output: Tensor, x: Tensor) -> Tensor:
        """`output += s B A dropout(x)`, in place."""
        lora, dropout = self.lora_weights, self._active_dropout
        if dropout is not None:
            x = dropout(x.to(lora.a.dtype))
        return lora_expand_(output, lora_shrink(x, lora), lora)

    def _fitting_mask(self, x: Tensor, mask: Tensor) -> Tensor:
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

    def _suffix_start(self, x: Tensor, suffix: int) -> int:
        if x.ndim != 3 or x.shape[1] < suffix:
            raise ValueError(
                f"gate suffix of {suffix} positions does not fit the input {list(x.shape)} of layer {self.layer_name}, "
                f"expected [rows, positions >= {suffix}, features]; open the gate with a mask, or leave layers that do "
                "not see all positions out of predictor.lora.target_modules"
            )
        return x.shape[1] - suffix


def use_gated_layers(config: LoraConfig, gate: Gate) -> None:
    """Let PEFT build `GatedLoraLinear` layers from a configuration, in `get_peft_model` and in `from_pretrained`.

    PEFT's own mechanism for custom layers; the adapter's files do not depend on it.

    Args:
        config: changed in place. Layers that are not linear stay PEFT's.
        gate: of the layers.
    """
    build: Any = partial(GatedLoraLinear, gate=gate)
    config._register_custom_module({nn.Linear: build, Conv1D: build})
