"""What `prepare_for_training` lists is all that it changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ptp_lightning.models import FullCopyStudent, GatedLoraStudent, LoraSettings, SharedStudent
from ptp_lightning.models.attention.dispatch import ATTENTION_NAME
from ptp_lightning.models.students import Student
from ptp_lightning.models.training_changes import prepare_for_training
from tests.helpers.tiny_models import TINY_MODELS

NORMS_AND_ATTENTION = {
    "LlamaRMSNorm": "MemoryEfficientRMSNorm",
    "LlamaAttention": "MemoryEfficientAttention",
}
ADAPTERS = {"Linear": "GatedLoraLinear", "LlamaMLP": "GatedLoraMLP"}
LORA = LoraSettings(rank=2)


def classes(model: nn.Module) -> dict[str, str]:
    """Of each module below the model, by name."""
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (GatedLoraStudent(), NORMS_AND_ATTENTION | ADAPTERS),
        (FullCopyStudent(), NORMS_AND_ATTENTION),
        (SharedStudent(), NORMS_AND_ATTENTION),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_classes_of_modules(student: Student, expected: dict[str, str]) -> None:
    model = TINY_MODELS["llama"]()
    before = classes(model)
    prepare_for_training(model, student, LORA)
    after = classes(model)
    changed = {(kind, after[name]) for name, kind in before.items() if after[name] != kind}
    assert changed == set(expected.items())
    added = after.keys() - before.keys()
    assert all(".base_layer" in name or ".lora_" in name for name in added)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize("family", TINY_MODELS)
def test_base_model_computes_the_same_bits(family: str) -> None:
    model = TINY_MODELS[family]()
    base, tokens = copy.deepcopy(model), torch.arange(1, 9).view(1, 8)
    networks = prepare_for_training(model, GatedLoraStudent(), LORA)
    with torch.no_grad():
        assert torch.equal(networks.language_model(tokens).logits, base(tokens).logits)
