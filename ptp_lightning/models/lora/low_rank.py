"""The low-rank formula of LoRA, and training kernels for frozen layers that carry it.

    y = x W^T + b + s (x A^T) B^T

`lora_shrink` and `lora_expand_` are the only place where the low-rank term is computed. They are two steps, so that
layers with the same input can share the first one.

W and b are frozen. The backward pass therefore needs only W, A, B, x and the few numbers of `x A^T`, which is what
`lora_linear` saves; both terms of the gradient with respect to x are added up in place. `lora_swiglu` does the same for
an MLP `down(act(gate(x)) * up(x))`: it saves x, gate(x) and up(x), and recomputes their product. On a CPU both walk
through the rows in parts that fit into the cache, which makes thin products faster and intermediates small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ptp_lightning.models.layers.row_parts import in_parts

Activation = Callable[[Tensor], Tensor]


class LoraWeights(NamedTuple):
    """A low-rank update.

    Attributes:
        a: A, `[r, in]`; its dtype may be wider than that of the base layer.
        b: B, `[out, r]`, in the dtype of A.
        scale: s, that is alpha / r.
    """

    a: Tensor
    b: Tensor
    scale: float


class LoraLinearWeights(NamedTuple):
    """A frozen linear layer with its low-rank update.

    Attributes:
        base: W, `[out, in]`, frozen.
        bias: b, `[out]`, frozen, or None.
        lora: the update.
    """

    base: Tensor
    bias: Tensor | None
    lora: LoraWeights

    def to(self, dtype: torch.dtype) -> LoraLinearWeights:
        """All weights in a dtype; gradients reach the originals."""
        bias = None if self.bias is None else self.bias.to(dtype)
        lora = LoraWeights(self.lora.a.to(dtype), self.lora.b.to(dtype), self.lora.scale)
        return LoraLinearWeights(self.base.to(dtype), bias, lora)


def lora_shrink(x: Tensor, lora: LoraWeights) -> Tensor:
    """First step of the low-rank term: `x A^T`, `[..., in]` to `[..., r]`, in the dtype of A."""
    return F.linear(x.to(lora.a.dtype), lora.a)


def lora_expand_(output: Tensor, shrunk: Tensor, lora: LoraWeights) -> Tensor:
    """Second step: `output += s shrunk B^T`, in place.

    Args:
        output: `[..., out]`, may be in a narrower dtype than the low-rank term.
        shrunk: `[..., r]`, result of `lora_shrink`.
        lora: the update.

    >>> lora = LoraWeights(a=torch.tensor([[1.0, 1.0]]), b=torch.tensor([[10.0], [0.0]]), scale=2.0)
    >>> x = torch.tensor([[3.0, 4.0]])
    >>> lora_expand_(torch.ones(1, 2), lora_shrink(x, lora), lora)
    tensor([[141.,   1.]])
    """
    return _add_product_(output, shrunk, lora.b.t(), lora.scale)


def lora_linear(x: Tensor, weights: LoraLinearWeights) -> Tensor:
    """A layer for training: `[..., in]` to `[..., out]` in the dtype of W, with gradients for x, A and B."""
    output = _LoraLinear.apply(x.to(weights.base.dtype), *_flat(weights))
    assert isinstance(output, Tensor)
    return output


def lora_swiglu(
    x: Tensor, activation: Activation, gate: LoraLinearWeights, up: LoraLinearWeights, down: LoraLinearWeights
) -> Tensor:
    """An MLP for training: `down(activation(gate(x)) * up(x))`, with gradients for x and each A and B.

    Args:
        x: `[..., width]`.
        activation: elementwise, SiLU in SwiGLU.
        gate: weights `[inner, width]`.
        up: weights `[inner, width]`.
        down: weights `[width, inner]`.
    """
    output = _LoraSwiGLU.apply(x.to(gate.base.dtype), activation, *_flat(gate), *_flat(up), *_flat(down))
    assert isinstance(output, Tensor)
    return output


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *flat: Any) -> Tensor:
        (weights,) = _layers(flat)
        output, shrunk = _allocate(x, weights)
        for x_part, output_part, shrunk_part in _in_parts(x, output, shrunk):
            _forward(x_part, weights, output_part, shrunk_part)
        ctx.save_for_backward(x, shrunk, weights.base, weights.lora.a, weights.lora.b)
        ctx.scale = weights.lora.scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shrunk, base, a, b = ctx.saved_tensors
        layer = _Backward(base, LoraWeights(a, b, ctx.scale))
        if not ctx.needs_input_grad[0]:
            for grad_part, x_part, shrunk_part in _in_parts(grad, x, shrunk):
                layer.accumulate(grad_part, x_part, shrunk_part)
            return None, *layer.flat_gradients
        x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        for grad_part, x_part, shrunk_part, x_grad_part in _in_parts(grad, x, shrunk, x_grad):
            layer.write_input_gradient(grad_part, x_part, shrunk_part, x_grad_part)
        return x_grad, *layer.flat_gradients


class _LoraSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, *flat: Any) -> Tensor:
        gate, up, down = layers = _layers(flat)
        # What is saved is allocated first: small tensors that stay would leave holes between those that are freed.
        gate_output, gate_shrunk = _allocate(x, gate)
        up_output, up_shrunk = _allocate(x, up)
        output, down_shrunk = _allocate(gate_output, down)
        tensors = x, gate_output, gate_shrunk, up_output, up_shrunk, output, down_shrunk
        for x_part, gate_part, gate_s, up_part, up_s, output_part, down_s in _in_parts(*tensors):
            _forward(x_part, gate, gate_part, gate_s)
            _forward(x_part, up, up_part, up_s)
            # Not in place: an activation may return its input, which is saved.
            _forward(activation(gate_part) * up_part, down, output_part, down_s)
        ctx.save_for_backward(
            *(x, gate_output, gate_shrunk, up_output, up_shrunk, down_shrunk),
            *(tensor for layer in layers for tensor in (layer.base, layer.lora.a, layer.lora.b)),
        )
        ctx.activation, ctx.scales = activation, [layer.lora.scale for layer in layers]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_output, gate_shrunk, up_output, up_shrunk, down_shrunk, *weights = ctx.saved_tensors
        layers = zip(weights[0::3], weights[1::3], weights[2::3], ctx.scales, strict=True)
        gate, up, down = (_Backward(base, LoraWeights(a, b, scale)) for base, a, b, scale in layers)
        x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        tensors = grad, x, gate_output, gate_shrunk, up_output, up_shrunk, down_shrunk, x_grad
        for grad_part, x_part, gate_part, gate_s, up_part, up_s, down_s, x_grad_part in _in_parts(*tensors):
            with torch.enable_grad():
                gate_leaf = gate_part.detach().requires_grad_()
                activated = ctx.activation(gate_leaf)
            product_grad = torch.empty_like(gate_part)
            down.write_input_gradient(grad_part, activated.detach() * up_part, down_s, product_grad)
            up_grad = product_grad * activated.detach()
            (gate_grad,) = torch.autograd.grad(activated, gate_leaf, product_grad.mul_(up_part))
            gate.write_input_gradient(gate_grad, x_part, gate_s, x_grad_part)
            up.write_input_gradient(up_grad, x_part, up_s, x_grad_part, add=True)
        return x_grad, None, *gate.flat_gradients, *up.flat_gradients, *down.flat_gradients


class _Backward:
    """The backward pass of one layer, some rows at a time.

    The gradient of B is accumulated transposed: a product with few rows is faster than one with few columns.
    """

    def __init__(self, base: Tensor, lora: LoraWeights) -> None:
        self._base = base
        self._lora = lora
        self._a_grad = torch.zeros_like(lora.a)
        self._b_t_grad = torch.zeros_like(lora.b.t(), memory_format=torch.contiguous_format)

    @property
    def flat_gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of what `_flat` lists, of A and B alone, summed over the rows so far."""
        return None, None, self._a_grad, self._b_t_grad.t().contiguous(), None

    def accumulate(self, grad: Tensor, x: Tensor, shrunk: Tensor) -> Tensor:
        """Add the gradients of A and B from rows `[m, out]`, `[m, in]`, `[m, r]`; returns that of `x A^T`, `[m, r]`."""
        _, b, scale = self._lora
        wide_grad = grad.to(b.dtype)
        shrunk_grad = (wide_grad @ b).mul_(scale)
        self._b_t_grad.addmm_(shrunk.t(), wide_grad, alpha=scale)
        self._a_grad.addmm_(shrunk_grad.t(), x.to(shrunk_grad.dtype))
        return shrunk_grad

    def write_input_gradient(
        self, grad: Tensor, x: Tensor, shrunk: Tensor, x_grad: Tensor, *, add: bool = False
    ) -> None:
        """As `accumulate`, and write the gradient of x into `x_grad` `[m, in]`, or add it to what is there."""
        shrunk_grad = self.accumulate(grad, x, shrunk)
        x_grad.addmm_(grad, self._base, beta=1 if add else 0)
        _add_product_(x_grad, shrunk_grad, self._lora.a, 1.0)


def _flat(weights: LoraLinearWeights) -> tuple[Any, ...]:
    """Autograd sees tensors only if they are arguments themselves."""
    return weights.base, weights.bias, *weights.lora


def _layers(flat: Sequence[Any]) -> list[LoraLinearWeights]:
    """Inverse of `_flat`, of one layer or several."""
    groups = zip(*(iter(flat),) * 5, strict=True)
    return [LoraLinearWeights(base, bias, LoraWeights(a, b, scale)) for base, bias, a, b, scale in groups]


def _allocate(x: Tensor, weights: LoraLinearWeights) -> tuple[Tensor, Tensor]:
    """Memory for the output `[..., out]` and for `x A^T` `[..., r]`."""
    output = x.new_empty(*x.shape[:-1], weights.base.shape[0])
    return output, weights.lora.a.new_empty(*x.shape[:-1], weights.lora.a.shape[0])


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*map(in_parts, tensors), strict=True)


def _forward(x: Tensor, weights: LoraLinearWeights, output: Tensor, shrunk: Tensor) -> None:
    """Write the output `[m, out]` and `x A^T` `[m, r]` of x `[m, in]`."""
    if weights.bias is None:
        torch.mm(x, weights.base.t(), out=output)
    else:
        torch.addmm(weights.bias, x, weights.base.t(), out=output)
    shrunk.copy_(lora_shrink(x, weights.lora))
    lora_expand_(output, shrunk, weights.lora)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`total += scale * left @ right` in place, `[..., m, n]`, `[..., m, k]` and `[k, n]`.

    Product and sum are one operation where dtypes agree and nothing is recorded: autograd would expand `right` for
    each row of a batch.
    """
    if torch.is_grad_enabled() or total.dtype != left.dtype or left.dtype != right.dtype:
        return total.add_(F.linear(left, right.t()), alpha=scale)
    if total.ndim == 2:
        return total.addmm_(left, right, alpha=scale)
    if len(total) == 1:
        total[0].addmm_(left[0], right, alpha=scale)
        return total
    return total.baddbmm_(left, right.expand(len(total), -1, -1), alpha=scale)
