"""Kernels for layers and MLPs with a low-rank update: values and gradients are those of the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from ptp_lightning.models.layers import row_parts
from ptp_lightning.models.lora.low_rank import (
    LoraLinearWeights,
    LoraWeights,
    lora_expand_,
    lora_linear,
    lora_shrink,
    lora_swiglu,
)

ROWS, INPUTS, OUTPUTS, INNER, RANK = (2, 5), 4, 3, 5, 2


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "PART_ROWS", 3)  # of 10 rows


def random_weights(has_bias: bool, inputs: int = INPUTS, outputs: int = OUTPUTS, seed: int = 0) -> LoraLinearWeights:
    generator = torch.Generator().manual_seed(seed)
    base, a, b, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((outputs, inputs), (RANK, inputs), (outputs, RANK), (outputs,))
    )
    lora = LoraWeights(a.requires_grad_(), b.requires_grad_(), 0.7 + seed)
    return LoraLinearWeights(base, bias if has_bias else None, lora)


def random_mlp(has_bias: bool) -> list[LoraLinearWeights]:
    """Gate, up and down."""
    shapes = (INPUTS, INNER), (INPUTS, INNER), (INNER, INPUTS)
    return [random_weights(has_bias, *shape, seed) for seed, shape in enumerate(shapes)]


def definition(x: Tensor, weights: LoraLinearWeights) -> Tensor:
    a, b, scale = weights.lora
    return linear(x, weights.base, weights.bias) + scale * linear(linear(x, a), b)


class TestExpand:
    """Each way to add the low-rank term in place: recorded by autograd or not, in one dtype or two."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("is_recorded", [False, True])
    @pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)], ids=str)
    def test_definition(self, shape: tuple[int, ...], is_recorded: bool, dtype: torch.dtype) -> None:
        lora = random_weights(has_bias=False).lora
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(*shape, INPUTS, generator=generator, dtype=dtype)
        output = torch.randn(*shape, OUTPUTS, generator=generator, dtype=dtype)
        with torch.no_grad():
            term = lora.scale * linear(linear(x.double(), lora.a), lora.b)
        expected = (output + term).to(dtype)
        with torch.set_grad_enabled(is_recorded):
            found = lora_expand_(output, lora_shrink(x, lora), lora)
        assert found.data_ptr() == output.data_ptr()
        torch.testing.assert_close(found.detach(), expected)

    @pytest.mark.parametrize("rows", [1, 2])
    def test_part_of_a_tensor(self, rows: int) -> None:
        """The last positions of every row, as the gate's suffix needs them."""
        lora = random_weights(has_bias=False).lora
        x, output = torch.randn(rows, 2, INPUTS, dtype=torch.float64), torch.zeros(rows, 5, OUTPUTS).double()
        with torch.no_grad():
            lora_expand_(output[:, 3:], lora_shrink(x, lora), lora)
            torch.testing.assert_close(output[:, 3:], lora.scale * linear(linear(x, lora.a), lora.b))
        assert not output[:, :3].any()


@pytest.mark.parametrize("has_bias", [False, True])
class TestDefinition:
    def test_linear(self, has_bias: bool) -> None:
        weights = random_weights(has_bias)
        x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(lora_linear(x, weights), definition(x, weights))

        def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return lora_linear(x, weights._replace(lora=weights.lora._replace(a=a, b=b)))

        assert torch.autograd.gradcheck(function, (x, weights.lora.a, weights.lora.b))
        assert torch.autograd.gradcheck(function, (x.detach(), weights.lora.a, weights.lora.b))

    @pytest.mark.parametrize("activation", [silu, gelu])
    def test_mlp(self, has_bias: bool, activation: Any) -> None:
        layers = random_mlp(has_bias)
        x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
        gate, up, down = layers
        expected = definition(activation(definition(x, gate)) * definition(x, up), down)
        torch.testing.assert_close(lora_swiglu(x, activation, *layers), expected)

        def function(x: Tensor, *adapters: Tensor) -> Tensor:
            pairs = zip(layers, adapters[::2], adapters[1::2], strict=True)
            replaced = [layer._replace(lora=layer.lora._replace(a=a, b=b)) for layer, a, b in pairs]
            return lora_swiglu(x, activation, *replaced)

        adapters = [adapter for layer in layers for adapter in (layer.lora.a, layer.lora.b)]
        assert torch.autograd.gradcheck(function, (x, *adapters))
        assert torch.autograd.gradcheck(function, (x.detach(), *adapters))

    def test_inputs_that_are_transposed(self, has_bias: bool) -> None:
        """Their rows do not follow each other in memory."""
        weights, layers = random_weights(has_bias), random_mlp(has_bias)
        x = torch.randn(*ROWS[::-1], INPUTS, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: lora_linear(x.transpose(0, 1), weights), x)
        assert torch.autograd.gradcheck(lambda x: lora_swiglu(x.transpose(0, 1), silu, *layers), x)

    def test_activation_that_returns_its_input(self, has_bias: bool) -> None:
        """As "linear" does, one of transformers' own: what is saved for the backward pass must not change."""
        layers = gate, up, down = random_mlp(has_bias)
        x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
        found, expected = (
            lora_swiglu(x, lambda x: x, *layers),
            definition(definition(x, gate) * definition(x, up), down),
        )
        torch.testing.assert_close(found, expected)
        for _ in range(2):
            gradients = [torch.autograd.grad(result.sum(), x, retain_graph=True) for result in (found, expected)]
            torch.testing.assert_close(*gradients)


def test_mlp_saves_its_input_and_the_two_tensors_that_it_multiplies() -> None:
    x = torch.randn(*ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
    saved = lora_swiglu(x, silu, *random_mlp(has_bias=False)).grad_fn.saved_tensors  # pyright: ignore
    large = [tensor.shape[-1] for tensor in saved if tensor.ndim == 3 and tensor.shape[-1] != RANK]
    assert sorted(large) == sorted([INPUTS, INNER, INNER])
