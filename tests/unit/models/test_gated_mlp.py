"""The table of MLPs that are fused holds those, and only those, that compute the fused formula."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ptp_lightning.models.lora.gated_lora import LoraSettings, add_gated_lora
from ptp_lightning.models.lora.gated_mlp import LINEAR_LAYERS, SUPPORTED_MLPS, GatedLoraMLP
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama

WIDTH, INNER = 6, 10


def config_of(module_name: str) -> PreTrainedConfig:
    """A small configuration of the model to which a module `transformers.models.NAME.modeling_NAME` belongs."""
    configuration = importlib.import_module(module_name.replace(".modeling_", ".configuration_"))
    kinds = [
        kind
        for kind in vars(configuration).values()
        if isinstance(kind, type) and issubclass(kind, PreTrainedConfig) and kind.__module__ == configuration.__name__
    ]
    kind = min(kinds, key=lambda kind: "Text" not in kind.__name__)  # of the text model, where there are several
    return kind(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=1, num_key_value_heads=1)


@pytest.mark.parametrize("name", sorted(SUPPORTED_MLPS))
def test_supported_mlps_compute_the_fused_formula(name: str) -> None:
    module_name, _, class_name = name.rpartition(".")
    mlp: Any = getattr(importlib.import_module(module_name), class_name)(config_of(module_name))
    mlp.train()  # dropout would be noticed
    assert set(mlp._modules) == {*LINEAR_LAYERS, "act_fn"}
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
    assert torch.equal(GatedLoraMLP(mlp)(x), mlp(x))


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", 2), ("qwen2", 2), ("qwen3", 2), ("gpt2", 0), ("gpt_neox", 0)]
)
def test_families(family: str, expected: int) -> None:
    model = TINY_MODELS[family]()
    names = list(model.state_dict())
    add_gated_lora(model, LoraSettings(rank=2))
    assert sum(isinstance(module, GatedLoraMLP) for module in model.modules()) == expected
    assert [name.replace(".base_layer", "") for name in model.state_dict() if "lora_" not in name] == names


def test_subclasses_and_partly_adapted_mlps_are_left_alone() -> None:
    model = tiny_llama()

    class ShiftedMLP(type(model.model.layers[0].mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    for layer in model.model.layers:
        layer.mlp.__class__ = ShiftedMLP
    add_gated_lora(model, LoraSettings(rank=2))
    assert not any(isinstance(module, GatedLoraMLP) for module in model.modules())

    model = tiny_llama()
    add_gated_lora(model, LoraSettings(rank=2, target_modules=["gate_proj", "up_proj"]))
    assert not any(isinstance(module, GatedLoraMLP) for module in model.modules())


def test_mode_is_kept() -> None:
    model = tiny_llama().train()
    add_gated_lora(model, LoraSettings(rank=2))
    mlps: list[nn.Module] = [module for module in model.modules() if isinstance(module, GatedLoraMLP)]
    assert mlps and all(mlp.training for mlp in mlps)
