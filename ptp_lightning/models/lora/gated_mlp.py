"""GatedLoraMLP: a SwiGLU MLP of three gated LoRA layers that saves less for the backward pass."""

from __future__ import annotations

from torch import Tensor, nn

from ptp_lightning.models.layers.replacement import replace_modules
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear
from ptp_lightning.models.lora.low_rank import LoraLinearWeights, lora_swiglu

SUPPORTED_MLPS = frozenset(
    {
        "transformers.models.cohere.modeling_cohere.CohereMLP",
        "transformers.models.cohere2.modeling_cohere2.Cohere2MLP",
        "transformers.models.ernie4_5.modeling_ernie4_5.Ernie4_5MLP",
        "transformers.models.exaone4.modeling_exaone4.Exaone4MLP",
        "transformers.models.gemma.modeling_gemma.GemmaMLP",
        "transformers.models.gemma2.modeling_gemma2.Gemma2MLP",
        "transformers.models.gemma3.modeling_gemma3.Gemma3MLP",
        "transformers.models.granite.modeling_granite.GraniteMLP",
        "transformers.models.helium.modeling_helium.HeliumMLP",
        "transformers.models.llama.modeling_llama.LlamaMLP",
        "transformers.models.ministral.modeling_ministral.MinistralMLP",
        "transformers.models.ministral3.modeling_ministral3.Ministral3MLP",
        "transformers.models.mistral.modeling_mistral.MistralMLP",
        "transformers.models.olmo.modeling_olmo.OlmoMLP",
        "transformers.models.olmo2.modeling_olmo2.Olmo2MLP",
        "transformers.models.olmo3.modeling_olmo3.Olmo3MLP",
        "transformers.models.qwen2.modeling_qwen2.Qwen2MLP",
        "transformers.models.qwen3.modeling_qwen3.Qwen3MLP",
        "transformers.models.smollm3.modeling_smollm3.SmolLM3MLP",
        "transformers.models.stablelm.modeling_stablelm.StableLmMLP",
    }
)
"""MLPs of transformers that compute `down_proj(act_fn(gate_proj(x)) * up_proj(x))` and nothing else.

Names rather than classes, so that no model is imported before it is used. Others work, but are not fused.
"""
LINEAR_LAYERS = ("gate_proj", "up_proj", "down_proj")


class GatedLoraMLP(nn.Module):
    """An MLP whose three linear layers are `GatedLoraLinear`: `down(act(gate(x)) * up(x))`.

    While the gate is open everywhere and gradients are wanted, one kernel computes all of it (`lora_swiglu`). In any
    other case the operations are those of the replaced MLP.

    Args:
        mlp: one of `SUPPORTED_MLPS`, whose parts are taken over.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj = mlp.get_submodule("gate_proj")
        self.up_proj = mlp.get_submodule("up_proj")
        self.down_proj = mlp.get_submodule("down_proj")
        self.act_fn = mlp.get_submodule("act_fn")
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        gate, up, down = (_training_weights(layer, x) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        if gate is not None and up is not None and down is not None:
            return lora_swiglu(x, self.act_fn, gate, up, down)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def fuse_mlps(model: nn.Module) -> None:
    """Replace the supported MLPs of a model by `GatedLoraMLP`, in place, if all three layers carry an adapter."""
    replace_modules(model, SUPPORTED_MLPS, GatedLoraMLP, condition=_is_adapted)


def _training_weights(layer: nn.Module, x: Tensor) -> LoraLinearWeights | None:
    """None also for a layer whose adapter has been unloaded."""
    return layer.training_weights(x) if isinstance(layer, GatedLoraLinear) else None


def _is_adapted(mlp: nn.Module) -> bool:
    return all(isinstance(mlp.get_submodule(name), GatedLoraLinear) for name in LINEAR_LAYERS)
