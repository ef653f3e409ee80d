"""Frozen linear layers with a low-rank update, for training: what autograd would keep and pass around is left out.

    y = x W^T + b + s (x A^T) B^T

W and b are frozen, so the backward pass needs W, A, B, x and the few numbers of `x A^T`, and both terms of the gradient
by x are added up in place. A gated unit of three such layers, down(act(gate(x)) up(x)), keeps x, gate(x) and up(x), and
makes their product again. A few rows are gone through at a time: thin products like A's cost less where their factors
still lie in the cache, and what lives between two layers is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.models.layers.row_parts import in_parts

Activation = Callable[[Tensor], Tensor]


class AdaptedWeights(NamedTuple):
    """Weights of a layer.

    Attributes:
        base: W, `[out, in]`, frozen.
        bias: b, `[out]`, frozen, or None.
        lora_a: A, `[r, in]`; its dtype is the low-rank term's, and may be wider than that of W.
        lora_b: B, `[out, r]`.
        scale: s.
    """

    base: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def to(self, dtype: torch.dtype) -> AdaptedWeights:
        """All of them in a dtype, with gradients for those that have some."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return AdaptedWeights(self.base.to(dtype), bias, self.lora_a.to(dtype), self.lora_b.to(dtype), self.scale)


def adapted_linear(x: Tensor, weights: AdaptedWeights) -> Tensor:
    """`[..., in]` to `[..., out]` in the dtype of W, with gradients for x, A and B."""
    result = _AdaptedLinear.apply(x.to(weights.base.dtype), *weights)
    assert isinstance(result, Tensor)
    return result


def adapted_unit(
    x: Tensor, activation: Activation, gate: AdaptedWeights, up: AdaptedWeights, down: AdaptedWeights
) -> Tensor:
    """`down(activation(gate(x)) * up(x))` of three `adapted_linear`, with gradients for x and each A and B.

    Args:
        x: `[..., width]`.
        activation: elementwise.
        gate: `[inner, width]`.
        up: likewise.
        down: `[width, inner]`.
    """
    result = _AdaptedUnit.apply(x.to(gate.base.dtype), activation, *gate, *up, *down)
    assert isinstance(result, Tensor)
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        weights = AdaptedWeights(base, bias, lora_a, lora_b, scale)
        result, reduced = _room(x, weights)
        for own, to_result, to_reduced in _by_parts(x, result, reduced):
            _forward(own, weights, to_result, to_reduced)
        ctx.save_for_backward(x, reduced, base, lora_a, lora_b)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, base, lora_a, lora_b = ctx.saved_tensors
        layer = _Backward(AdaptedWeights(base, None, lora_a, lora_b, ctx.scale))
        if not ctx.needs_input_grad[0]:
            for own_grad, own, own_reduced in _by_parts(grad, x, reduced):
                layer.through_adapter(own_grad, own, own_reduced)
            return None, None, None, *layer.of_adapter, None
        of_x = torch.empty_like(x)
        for own_grad, own, own_reduced, to_x in _by_parts(grad, x, reduced, of_x):
            layer.by_input(own_grad, own, own_reduced, to_x, begins=True)
        return of_x, None, None, *layer.of_adapter, None


class _AdaptedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, *weights: Any) -> Tensor:
        gate, up, down = layers = _three(weights)
        # What stays is allocated before what goes: small pieces that stay in between would cut freed memory up.
        gated, reduced_by_gate = _room(x, gate)
        upped, reduced_by_up = _room(x, up)
        result, reduced_by_down = _room(gated, down)
        tensors = x, gated, reduced_by_gate, upped, reduced_by_up, result, reduced_by_down
        for own, to_gated, to_by_gate, to_upped, to_by_up, to_result, to_by_down in _by_parts(*tensors):
            _forward(own, gate, to_gated, to_by_gate)
            _forward(own, up, to_upped, to_by_up)
            # not in place: an activation may give back its input, which is kept
            _forward(activation(to_gated) * to_upped, down, to_result, to_by_down)
        ctx.save_for_backward(
            *(x, gated, reduced_by_gate, upped, reduced_by_up, reduced_by_down),
            *(tensor for layer in layers for tensor in (layer.base, layer.lora_a, layer.lora_b)),
        )
        ctx.activation, ctx.scales = activation, [layer.scale for layer in layers]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, reduced_by_gate, upped, reduced_by_up, reduced_by_down, *tensors = ctx.saved_tensors
        bases, lora_as, lora_bs = tensors[0::3], tensors[1::3], tensors[2::3]
        gate, up, down = (
            _Backward(AdaptedWeights(base, None, lora_a, lora_b, scale))
            for base, lora_a, lora_b, scale in zip(bases, lora_as, lora_bs, ctx.scales, strict=True)
        )
        of_x = torch.empty_like(x)
        tensors = grad, x, gated, reduced_by_gate, upped, reduced_by_up, reduced_by_down, of_x
        for own_grad, own, own_gated, by_gate, own_upped, by_up, by_down, to_x in _by_parts(*tensors):
            with torch.enable_grad():
                leaf = own_gated.detach().requires_grad_()
                activated = ctx.activation(leaf)
            of_product = torch.empty_like(own_gated)
            down.by_input(own_grad, activated.detach() * own_upped, by_down, of_product, begins=True)
            of_upped = of_product * activated.detach()
            (of_gated,) = torch.autograd.grad(activated, leaf, of_product.mul_(own_upped))
            gate.by_input(of_gated, own, by_gate, to_x, begins=True)
            up.by_input(of_upped, own, by_up, to_x, begins=False)
        of_adapters = (part for layer in (gate, up, down) for part in (None, None, *layer.of_adapter, None))
        return of_x, None, *of_adapters


class _Backward:
    """The backward pass of a layer, a few rows at a time.

    B's gradient is made transposed: a product with few rows is faster than one with few columns.
    """

    def __init__(self, weights: AdaptedWeights) -> None:
        self._weights = weights
        self._of_a = torch.zeros_like(weights.lora_a)
        self._of_b_t = torch.zeros_like(weights.lora_b.t(), memory_format=torch.contiguous_format)

    @property
    def of_adapter(self) -> tuple[Tensor, Tensor]:
        """Gradients by A and B of the rows so far."""
        return self._of_a, self._of_b_t.t().contiguous()

    def through_adapter(self, grad: Tensor, x: Tensor, reduced: Tensor) -> Tensor:
        """Of rows `[m, out]`, `[m, in]` and `[m, r]`: the gradient by `x A^T`, `[m, r]`."""
        lora_b, scale = self._weights.lora_b, self._weights.scale
        wide = grad.to(lora_b.dtype)
        of_reduced = (wide @ lora_b).mul_(scale)
        self._of_b_t.addmm_(reduced.t(), wide, alpha=scale)
        self._of_a.addmm_(of_reduced.t(), x.to(of_reduced.dtype))
        return of_reduced

    def by_input(self, grad: Tensor, x: Tensor, reduced: Tensor, of_x: Tensor, *, begins: bool) -> None:
        """As `through_adapter`, and fill in the gradient by x, or add to it what is not its beginning."""
        of_reduced = self.through_adapter(grad, x, reduced)
        of_x.addmm_(grad, self._weights.base, beta=0 if begins else 1)
        _add_product(of_x, of_reduced, self._weights.lora_a, 1.0)


def _three(weights: Sequence[Any]) -> list[AdaptedWeights]:
    size = len(AdaptedWeights._fields)
    return [AdaptedWeights(*weights[begin : begin + size]) for begin in range(0, len(weights), size)]


def _room(x: Tensor, weights: AdaptedWeights) -> tuple[Tensor, Tensor]:
    """For the result `[..., out]` and `x A^T` `[..., r]`."""
    result = x.new_empty(*x.shape[:-1], weights.base.shape[0])
    return result, weights.lora_a.new_empty(*x.shape[:-1], weights.lora_a.shape[0])


def _by_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*map(in_parts, tensors), strict=True)


def _forward(x: Tensor, weights: AdaptedWeights, result: Tensor, reduced: Tensor) -> None:
    """Of x `[m, in]`, fill in the result and `x A^T` `[m, r]`."""
    base, bias, lora_a, lora_b, scale = weights
    if bias is None:
        torch.mm(x, base.t(), out=result)
    else:
        torch.addmm(bias, x, base.t(), out=result)
    torch.mm(x.to(lora_a.dtype), lora_a.t(), out=reduced)
    _add_product(result, reduced, lora_b.t(), scale)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`total += scale * left @ right`, in place; the product is in its factors' dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
