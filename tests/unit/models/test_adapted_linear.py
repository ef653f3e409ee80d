"""Adapted layers and gated units in training: values and gradients are those of what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from ptp_lightning.models import gated_lora, row_parts
from ptp_lightning.models.adapted_linear import AdaptedWeights, adapted_linear, adapted_product
from ptp_lightning.models.gated_lora import LoraSettings, add_gated_lora
from tests.tiny_models import TINY_MODELS, cast_weights, tiny_llama

ROWS, INPUTS, OUTPUTS, RANK = (2, 5), 4, 3, 2


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART_ROWS", 3)  # of 10 rows


def random_weights(has_bias: bool) -> AdaptedWeights:
    torch.manual_seed(0)
    base, lora_a, lora_b, bias = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((OUTPUTS, INPUTS), (RANK, INPUTS), (OUTPUTS, RANK), OUTPUTS)
    )
    return AdaptedWeights(base, bias if has_bias else None, lora_a.requires_grad_(), lora_b.requires_grad_(), 0.7)


def definition(x: Tensor, weights: AdaptedWeights) -> Tensor:
    base, bias, lora_a, lora_b, scale = weights
    return linear(x, base, bias) + scale * linear(linear(x, lora_a), lora_b)


@pytest.mark.parametrize("has_bias", [False, True])
class TestDefinition:
    def test_linear(self, has_bias: bool) -> None:
        weights = random_weights(has_bias)
        x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(adapted_linear(x, weights), definition(x, weights))

        def function(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
            return adapted_linear(x, weights._replace(lora_a=lora_a, lora_b=lora_b))

        assert torch.autograd.gradcheck(function, (x, weights.lora_a, weights.lora_b))
        assert torch.autograd.gradcheck(function, (x.detach(), weights.lora_a, weights.lora_b))

    @pytest.mark.parametrize("activation", [silu, gelu])
    def test_product(self, has_bias: bool, activation: Any) -> None:
        weights = random_weights(has_bias)
        gate, up = (torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True) for _ in range(2))
        found = adapted_product(gate, up, activation, weights)
        torch.testing.assert_close(found, definition(activation(gate) * up, weights))

        def function(gate: Tensor, up: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
            return adapted_product(gate, up, activation, weights._replace(lora_a=lora_a, lora_b=lora_b))

        assert torch.autograd.gradcheck(function, (gate, up, weights.lora_a, weights.lora_b))

    def test_inputs_stay_as_they_are(self, has_bias: bool) -> None:
        gate, up = (torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True) for _ in range(2))
        before = gate.detach().clone(), up.detach().clone()
        adapted_product(gate, up, lambda x: x.clone(), random_weights(has_bias)).sum().backward()
        assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


def run(family: str, dtype: torch.dtype, *, short_way: bool, autocast: bool = False) -> dict[str, Tensor]:
    """Hidden states of a call with the gate open, and the gradients of its adapter."""
    model = cast_weights(TINY_MODELS[family](), dtype)
    peft_model, gate = add_gated_lora(model, LoraSettings(rank=2, alpha=1.0))
    if dtype == torch.float64:
        peft_model.double()
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    with pytest.MonkeyPatch.context() as patch:
        if not short_way:
            patch.setattr(gated_lora, "_trained_weights", lambda *_: None)
        with gate.open(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoder = getattr(model, model.base_model_prefix)
            hidden = decoder(input_ids=torch.arange(14).view(2, 7), use_cache=False).last_hidden_state
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    hidden.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"hidden": hidden.detach(), **gradients}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_model_trains_as_by_the_long_way(family: str) -> None:
    short, long = (run(family, torch.float64, short_way=short_way) for short_way in (True, False))
    for name, expected in long.items():
        torch.testing.assert_close(short[name], expected, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_in_bfloat16_with_a_float32_adapter(dtype: torch.dtype, autocast: bool) -> None:
    short, long = (run("llama", dtype, short_way=short_way, autocast=autocast) for short_way in (True, False))
    assert short["hidden"].dtype == long["hidden"].dtype == dtype
    assert {gradient.dtype for name, gradient in short.items() if name != "hidden"} == {torch.float32}
    exact = run("llama", torch.float64, short_way=False)
    for name, right in exact.items():
        by_short, by_long = ((found[name] - right).norm() / right.norm() for found in (short, long))
        assert by_short < 1.5 * by_long + 0.01, (name, by_short, by_long)


class TestWhereTheLongWayIsTaken:
    def layer(self, **settings: Any) -> tuple[nn.Module, Any, Any]:
        peft_model, gate = add_gated_lora(tiny_llama(), LoraSettings(rank=2, **settings))
        return peft_model, peft_model.get_base_model().model.layers[0].mlp, gate  # pyright: ignore

    def test_everything_else(self) -> None:
        _, mlp, _ = self.layer()
        assert gated_lora._trained_weights(mlp.down_proj, "cpu") is not None
        mlp.down_proj.enable_adapters(False)
        assert gated_lora._trained_weights(mlp.down_proj, "cpu") is None
        mlp.down_proj.enable_adapters(True)
        mlp.down_proj.base_layer.weight.requires_grad_(True)
        assert gated_lora._trained_weights(mlp.down_proj, "cpu") is None

    def test_dropout_while_it_acts(self) -> None:
        peft_model, mlp, _ = self.layer(dropout=0.5)
        assert gated_lora._trained_weights(mlp.down_proj, "cpu") is not None
        peft_model.train()
        assert gated_lora._trained_weights(mlp.down_proj, "cpu") is None

    def test_an_mlp_with_the_same_parts_that_computes_something_else(self) -> None:
        _, mlp, _ = self.layer()
        assert gated_lora._is_gated_unit(mlp)

        class Other(type(mlp)):
            def forward(self, x: Tensor) -> Tensor:
                return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

        mlp.__class__ = Other
        assert not gated_lora._is_gated_unit(mlp)


def test_a_gated_unit_keeps_its_two_inputs_alone() -> None:
    weights = random_weights(has_bias=False)
    gate, up = (torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept = adapted_product(gate, up, silu, weights).grad_fn.saved_tensors  # pyright: ignore
    large = [tensor for tensor in kept if tensor.shape[-1] == INPUTS and tensor.ndim == 3]
    assert len(large) == 2 and large[0] is gate and large[1] is up
