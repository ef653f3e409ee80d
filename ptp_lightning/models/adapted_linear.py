"""Frozen linear layers with a low-rank update, for training: what autograd would keep and pass around is left out.

    y = x W^T + b + s (x A^T) B^T

W and b are frozen, so the backward pass needs W, A, B, x and the few numbers of `x A^T`, and both terms of the gradient
by x are added up in place. The last layer of a gated unit, x = act(g) u, keeps g and u and makes x again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.models.row_parts import in_parts

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


def adapted_product(gate: Tensor, up: Tensor, activation: Activation, weights: AdaptedWeights) -> Tensor:
    """`adapted_linear(activation(gate) * up)`, with gradients for both, A and B; `activation` is elementwise."""
    result = _AdaptedProduct.apply(gate, up, activation, *weights)
    assert isinstance(result, Tensor)
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        result = x.new_empty(*x.shape[:-1], base.shape[0])
        reduced = lora_a.new_empty(*x.shape[:-1], lora_a.shape[0])
        weights = AdaptedWeights(base, bias, lora_a, lora_b, scale)
        _forward(x.flatten(0, -2), weights, result.flatten(0, -2), reduced.flatten(0, -2))
        ctx.save_for_backward(x, reduced, base, lora_a, lora_b)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, base, lora_a, lora_b = ctx.saved_tensors
        weights = AdaptedWeights(base, None, lora_a, lora_b, ctx.scale)
        of_x, of_a, of_b = _backward(grad, x, reduced, weights, needs_input=ctx.needs_input_grad[0])
        return of_x, None, None, of_a, of_b, None


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Activation,
        base: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
    ) -> Tensor:
        weights = AdaptedWeights(base, bias, lora_a, lora_b, scale)
        # What stays is allocated before what goes: small pieces that stay in between would cut freed memory up.
        result = gate.new_empty(*gate.shape[:-1], base.shape[0])
        reduced = lora_a.new_empty(*gate.shape[:-1], lora_a.shape[0])
        for own_gate, own_up, to_result, to_reduced in zip(*map(in_parts, (gate, up, result, reduced)), strict=True):
            _forward(activation(own_gate).mul_(own_up), weights, to_result, to_reduced)
        ctx.save_for_backward(gate, up, reduced, base, lora_a, lora_b)
        ctx.activation, ctx.scale = activation, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, reduced, base, lora_a, lora_b = ctx.saved_tensors
        weights = AdaptedWeights(base, None, lora_a, lora_b, ctx.scale)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        of_a, of_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
        tensors = (grad, gate, up, reduced, of_gate, of_up)
        for own_grad, own_gate, own_up, own_reduced, to_gate, to_up in zip(*map(in_parts, tensors), strict=True):
            with torch.enable_grad():
                leaf = own_gate.detach().requires_grad_()
                activated = ctx.activation(leaf)
            x = activated.detach() * own_up
            of_x, more_of_a, more_of_b = _backward(own_grad, x, own_reduced, weights, needs_input=True)
            assert of_x is not None
            of_a += more_of_a
            of_b += more_of_b
            torch.mul(of_x, activated.detach(), out=to_up)
            to_gate.copy_(torch.autograd.grad(activated, leaf, of_x.mul_(own_up))[0])
        return of_gate, of_up, None, None, None, of_a, of_b, None


def _forward(x: Tensor, weights: AdaptedWeights, result: Tensor, reduced: Tensor) -> None:
    """Of x `[m, in]`, fill in the result and `x A^T` `[m, r]`."""
    base, bias, lora_a, lora_b, scale = weights
    if bias is None:
        torch.mm(x, base.t(), out=result)
    else:
        torch.addmm(bias, x, base.t(), out=result)
    torch.mm(x.to(lora_a.dtype), lora_a.t(), out=reduced)
    _add_product(result, reduced, lora_b.t(), scale)


def _backward(
    grad: Tensor, x: Tensor, reduced: Tensor, weights: AdaptedWeights, *, needs_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients by x, A and B."""
    wide = grad.to(weights.lora_b.dtype)
    of_reduced = (wide @ weights.lora_b).mul_(weights.scale)
    of_b = (wide.flatten(0, -2).t() @ reduced.flatten(0, -2)).mul_(weights.scale)
    of_a = of_reduced.flatten(0, -2).t() @ x.flatten(0, -2).to(of_reduced.dtype)
    if not needs_input:
        return None, of_a, of_b
    of_x = grad @ weights.base
    _add_product(of_x, of_reduced, weights.lora_a, 1.0)
    return of_x, of_a, of_b


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`total += scale * left @ right`, in place; the product is in its factors' dtype."""
    if total.dtype == left.dtype:
        total.view(-1, total.shape[-1]).addmm_(left.flatten(0, -2), right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
