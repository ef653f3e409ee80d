"""Gated LoRA in training: the fused kernels give the values and gradients of the operations that they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptp_lightning.models.layers import row_parts
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear
from ptp_lightning.models.lora.gated_lora import ALL_LINEAR, LoraSettings, add_gated_lora
from tests.helpers.tiny_models import TINY_MODELS, cast_weights, tiny_llama


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART_ROWS", 3)  # of 14 rows


def run(
    family: str,
    dtype: torch.dtype,
    *,
    is_fused: bool,
    autocast: bool = False,
    target_modules: str | list[str] = ALL_LINEAR,
) -> dict[str, Tensor]:
    """Hidden states of a call with the gate open, and the gradients of its adapter."""
    model = cast_weights(TINY_MODELS[family](), dtype)
    peft_model, gate = add_gated_lora(model, LoraSettings(rank=2, alpha=1.0, target_modules=target_modules))
    if dtype == torch.float64:
        peft_model.double()
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    with pytest.MonkeyPatch.context() as patch:
        if not is_fused:
            patch.setattr(GatedLoraLinear, "training_weights", lambda *_: None)
        with gate.open(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoder = getattr(model, model.base_model_prefix)
            hidden = decoder(input_ids=torch.arange(14).view(2, 7), use_cache=False).last_hidden_state
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    hidden.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"hidden": hidden.detach(), **gradients}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("family", TINY_MODELS)
def test_models(family: str) -> None:
    fused, plain = (run(family, torch.float64, is_fused=is_fused) for is_fused in (True, False))
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "up_proj"], ["gate_proj", "down_proj"]], ids=str)
def test_mlps_with_some_adapted_layers(targets: list[str]) -> None:
    fused, plain = (
        run("llama", torch.float64, is_fused=is_fused, target_modules=targets) for is_fused in (True, False)
    )
    assert fused.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_in_bfloat16_with_a_float32_adapter(dtype: torch.dtype, autocast: bool) -> None:
    fused, plain = (run("llama", dtype, is_fused=is_fused, autocast=autocast) for is_fused in (True, False))
    assert fused["hidden"].dtype == plain["hidden"].dtype == dtype
    assert {gradient.dtype for name, gradient in fused.items() if name != "hidden"} == {torch.float32}
    exact = run("llama", torch.float64, is_fused=False)
    for name, expected in exact.items():
        of_fused, of_plain = ((found[name] - expected).norm() / expected.norm() for found in (fused, plain))
        assert of_fused < 1.5 * of_plain + 0.01, (name, of_fused, of_plain)


class TestWhenNothingIsFused:
    def layer(self, **settings: Any) -> tuple[nn.Module, Any, Any]:
        peft_model, gate = add_gated_lora(tiny_llama(), LoraSettings(rank=2, **settings))
        return peft_model, peft_model.get_base_model().model.layers[0].mlp.down_proj, gate  # pyright: ignore

    def test_other_states_of_the_gate_and_no_gradients(self) -> None:
        _, layer, gate = self.layer()
        x = torch.zeros(1, 3, layer.in_features)
        assert layer.training_weights(x) is None
        with gate.open(suffix=1):
            assert layer.training_weights(x) is None
        with gate.open(), torch.no_grad():
            assert layer.training_weights(x) is None

    def test_disabled_adapter_and_trained_base(self) -> None:
        _, layer, gate = self.layer()
        x = torch.zeros(1, 3, layer.in_features)
        with gate.open():
            assert layer.training_weights(x) is not None
            layer.enable_adapters(False)
            assert layer.training_weights(x) is None
            layer.enable_adapters(True)
            layer.base_layer.weight.requires_grad_(True)
            assert layer.training_weights(x) is None

    def test_active_dropout(self) -> None:
        peft_model, layer, gate = self.layer(dropout=0.5)
        x = torch.zeros(1, 3, layer.in_features)
        with gate.open():
            assert layer.training_weights(x) is not None
            peft_model.train()
            assert layer.training_weights(x) is None
