"""Norms and rotary attention of transformers' models with fewer intermediates, for the training of windows.

Autograd keeps what it keeps of transformers' own. What goes are tensors as large as all hidden states that live for one
operation each: between those that stay they would leave holes in a CPU's heap, a fifth of what a step takes.
Where nothing is trained, and in compiled layers, modules are their own, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.models.attention.interface import WindowKeys
from ptp_lightning.models.layers.mixed_in import MixedIn, mix_in
from ptp_lightning.models.layers.row_parts import in_batch_parts, in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_DIFFERENCE = 0.01  # of norms, in 16 bits
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def make_lean(model: PreTrainedModel) -> None:
    """Let those modules whose arithmetic is known do with fewer intermediates; whether it is, is tried out.

    Args:
        model: attends through `attend_to_windows`; changed in place.
    """
    for module in model.modules():
        if _is_rms_norm(module):
            mix_in(module, _LeanNorm)
        elif _is_rotary_attention(module):
            mix_in(module, _LeanAttention)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension, the quotient in float32, as in transformers.

    Args:
        x: `[..., H]`.
        weight: `[H]`, frozen, in the dtype of x.
        epsilon: of the root.

    Returns:
        `[..., H]`, with gradients for x.
    """
    result = _RmsNorm.apply(x, weight, epsilon)
    assert isinstance(result, Tensor)
    return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of every head against each other, in place.

    Args:
        x: `[B, T, heads * D]`, which no other operation needs for its gradients.
        cos: `[B or 1, T, D]`, both halves the same.
        sin: likewise.

    Returns:
        x, with gradients.
    """
    result = _Rotation.apply(x, cos, sin)
    assert isinstance(result, Tensor)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result = torch.empty_like(x)
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        for own, to_scale, to_result in zip(*map(in_parts, (x, scale, result)), strict=True):
            wide = own.to(scale.dtype)
            torch.rsqrt((wide * wide).mean(-1, keepdim=True).add_(epsilon), out=to_scale)
            to_result.copy_(wide * to_scale).mul_(weight)
        ctx.save_for_backward(x, scale, weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        result = torch.empty_like(x)
        for own_grad, own, own_scale, to_result in zip(*map(in_parts, (grad, x, scale, result)), strict=True):
            normed = own.to(scale.dtype) * own_scale
            of_normed = (own_grad * weight).to(scale.dtype)
            along = (of_normed * normed).mean(-1, keepdim=True)
            to_result.copy_(of_normed.addcmul_(normed, along, value=-1).mul_(own_scale))
        return result, None, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        _rotate(x, cos, sin)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        _rotate(grad, cos, -sin)
        return grad, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """In place, `[B, T, heads * D]`; on a CPU a few of B at a time."""
    half = cos.shape[-1] // 2
    heads = x.unflatten(-1, (-1, 2, half))
    cos, sin = (table[..., :half].unsqueeze(-2).expand(len(x), -1, -1, -1) for table in (cos, sin))
    for part, own_cos, own_sin in zip(*map(in_batch_parts, (heads, cos, sin)), strict=True):
        first, second = part.unbind(-2)
        before = first.clone()
        first.mul_(own_cos).addcmul_(second, own_sin, value=-1)
        second.mul_(own_cos).addcmul_(before, own_sin)


def _is_trained_in_own_dtype(x: Tensor) -> bool:
    """Whether gradients are wanted, of no compiler, and products have the dtype of x: under autocast they do not."""
    is_trained = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_trained and not torch.is_autocast_enabled(x.device.type)


class _LeanNorm(MixedIn):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """`[..., H]` to the same."""
        weight = self.weight
        is_lean = torch.is_grad_enabled() and hidden_states.requires_grad and not weight.requires_grad
        if is_lean and hidden_states.dtype == weight.dtype and not torch.compiler.is_compiling():
            return rms_norm(hidden_states, weight, self.variance_epsilon)
        return super().forward(hidden_states)  # pyright: ignore[reportAttributeAccessIssue]


class _LeanAttention(MixedIn):
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        window_keys: WindowKeys | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As those of transformers: `[B, T, H]` to the same, and no weights."""
        if window_keys is not None and _is_trained_in_own_dtype(hidden_states):
            assert position_embeddings is not None, "given where windows are read"
            return _attend(self, hidden_states, position_embeddings, window_keys), None
        if window_keys is not None:
            kwargs["window_keys"] = window_keys
        return super().forward(  # pyright: ignore[reportAttributeAccessIssue]
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )


def _attend(module: Any, hidden: Tensor, tables: tuple[Tensor, Tensor], window_keys: WindowKeys) -> Tensor:
    """Attention of a layer whose queries and keys are rotated as they come."""
    query, key, value = (layer(hidden) for layer in (module.q_proj, module.k_proj, module.v_proj))
    query, key = (rotated(part, *tables) for part in (query, key))
    query, key, value = (part.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for part in (query, key, value))
    attended = window_keys.attend(module.layer_idx, query, key, value, module.scaling)
    return module.o_proj(attended.flatten(2).contiguous())


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    weight = module._parameters.get("weight")
    if set(module._parameters) != {"weight"} or weight.ndim != 1 or not hasattr(module, "variance_epsilon"):
        return False
    x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device).view(1, -1)
    expected = _RmsNorm.apply(x, weight, module.variance_epsilon)
    return _is_same(type(module).forward(module, x), expected)


class _Mixture:
    """Tells whether queries, keys and values are those expected: adds them up."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`[B, T, heads, D]`."""
        shared = query.shape[1] // key.shape[1]
        others = (2 * key + 3 * value).repeat_interleave(shared, dim=1)
        return ((query + others) * scale).transpose(1, 2).contiguous()


@torch.no_grad()
def _is_rotary_attention(module: Any) -> bool:
    if set(module._modules) != PROJECTIONS or not hasattr(module, "head_dim") or not hasattr(module, "scaling"):
        return False
    weight, size = module.q_proj.weight, module.head_dim
    x = torch.linspace(-1, 2, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 3, -1)
    angles = torch.linspace(0, 1, 3 * (size // 2), device=weight.device).view(1, 3, -1).repeat(1, 1, 2)
    tables = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=weight.device)
    try:
        found, _ = type(module).forward(
            module, x, position_embeddings=tables, attention_mask=mask, window_keys=_Mixture()
        )
    except (TypeError, ValueError):  # has other arguments, or attention that windows know nothing of
        return False
    return _is_same(found, _attend(module, x, tables, _Mixture()))


def _is_same(found: Tensor, expected: Tensor) -> bool:
    """But for rounding."""
    return bool((found - expected).norm() <= LARGEST_DIFFERENCE * expected.norm())
