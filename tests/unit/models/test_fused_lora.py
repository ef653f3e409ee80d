"""Adapted layers and gated units in training: values and gradients are those of what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from ptp_lightning.models.layers import row_parts
from ptp_lightning.models.lora import gated_lora
from ptp_lightning.models.lora.fused_lora import AdaptedWeights, adapted_linear, adapted_unit
from ptp_lightning.models.lora.gated_lora import ALL_LINEAR, LoraSettings, add_gated_lora
from tests.helpers.tiny_models import TINY_MODELS, cast_weights, tiny_llama

ROWS, INPUTS, OUTPUTS, INNER, RANK = (2, 5), 4, 3, 5, 2


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART_ROWS", 3)  # of 10 rows


def random_weights(has_bias: bool, inputs: int = INPUTS, outputs: int = OUTPUTS, seed: int = 0) -> AdaptedWeights:
    generator = torch.Generator().manual_seed(seed)
    base, lora_a, lora_b, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((outputs, inputs), (RANK, inputs), (outputs, RANK), (outputs,))
    )
    bias = bias if has_bias else None
    return AdaptedWeights(base, bias, lora_a.requires_grad_(), lora_b.requires_grad_(), 0.7 + seed)


def random_unit(has_bias: bool) -> list[AdaptedWeights]:
    shapes = (INPUTS, INNER), (INPUTS, INNER), (INNER, INPUTS)
    return [random_weights(has_bias, *shape, seed) for seed, shape in enumerate(shapes)]


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
    def test_unit(self, has_bias: bool, activation: Any) -> None:
        layers = random_unit(has_bias)
        x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
        gate, up, down = layers
        expected = definition(activation(definition(x, gate)) * definition(x, up), down)
        torch.testing.assert_close(adapted_unit(x, activation, *layers), expected)

        def function(x: Tensor, *adapters: Tensor) -> Tensor:
            parts = zip(layers, adapters[::2], adapters[1::2], strict=True)
            replaced = [layer._replace(lora_a=lora_a, lora_b=lora_b) for layer, lora_a, lora_b in parts]
            return adapted_unit(x, activation, *replaced)

        adapters = [adapter for layer in layers for adapter in (layer.lora_a, layer.lora_b)]
        assert torch.autograd.gradcheck(function, (x, *adapters))
        assert torch.autograd.gradcheck(function, (x.detach(), *adapters))

    def test_an_activation_that_gives_back_its_input(self, has_bias: bool) -> None:
        """As "linear" does, one of transformers' own: what the unit keeps of it stays as it is."""
        layers = gate, up, down = random_unit(has_bias)
        x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
        found, expected = (
            adapted_unit(x, lambda x: x, *layers),
            definition(definition(x, gate) * definition(x, up), down),
        )
        torch.testing.assert_close(found, expected)
        for _ in range(2):
            gradients = [torch.autograd.grad(result.sum(), x, retain_graph=True) for result in (found, expected)]
            torch.testing.assert_close(*gradients)


def run(
    family: str,
    dtype: torch.dtype,
    *,
    short_way: bool,
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


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "up_proj"], ["gate_proj", "down_proj"]], ids=str)
def test_so_do_gated_units_that_are_adapted_in_part(targets: list[str]) -> None:
    short, long = (
        run("llama", torch.float64, short_way=short_way, target_modules=targets) for short_way in (True, False)
    )
    assert short.keys() == long.keys()
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


def test_a_gated_unit_keeps_its_input_and_the_two_that_it_multiplies() -> None:
    x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
    kept = adapted_unit(x, silu, *random_unit(has_bias=False)).grad_fn.saved_tensors  # pyright: ignore
    large = [tensor.shape[-1] for tensor in kept if tensor.ndim == 3 and tensor.shape[-1] != RANK]
    assert sorted(large) == sorted([INPUTS, INNER, INNER])
