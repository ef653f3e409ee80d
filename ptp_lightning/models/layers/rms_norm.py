"""RMS norms of transformers with fewer intermediates, for training.

Autograd saves what it saves of transformers' own. What is saved in memory are tensors as large as all hidden states
that live for one operation each, and the holes that they leave in a CPU's heap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptp_lightning.models.layers.row_parts import in_parts

SUPPORTED_NORMS = frozenset(
    {
        "transformers.models.ernie4_5.modeling_ernie4_5.Ernie4_5RMSNorm",
        "transformers.models.exaone4.modeling_exaone4.Exaone4RMSNorm",
        "transformers.models.granite.modeling_granite.GraniteRMSNorm",
        "transformers.models.llama.modeling_llama.LlamaRMSNorm",
        "transformers.models.ministral.modeling_ministral.MinistralRMSNorm",
        "transformers.models.ministral3.modeling_ministral3.Ministral3RMSNorm",
        "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
        "transformers.models.phi3.modeling_phi3.Phi3RMSNorm",
        "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
        "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
        "transformers.models.seed_oss.modeling_seed_oss.SeedOssRMSNorm",
        "transformers.models.smollm3.modeling_smollm3.SmolLM3RMSNorm",
    }
)
"""Norms of transformers that compute what `rms_norm` computes."""


class MemoryEfficientRMSNorm(nn.Module):
    """A norm that is `rms_norm` where gradients are wanted, and in any other case the norm that it replaces.

    Args:
        norm: one of `SUPPORTED_NORMS`, whose parameters are taken over.
    """

    weight: Tensor
    variance_epsilon: float

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(norm))
        self.library_class = type(norm)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., H]` to the same."""
        is_trained_through = torch.is_grad_enabled() and hidden_states.requires_grad and not self.weight.requires_grad
        if is_trained_through and hidden_states.dtype == self.weight.dtype and not torch.compiler.is_compiling():
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return self.library_class.forward(self, hidden_states)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension, the quotient in float32, as in transformers.

    Args:
        x: `[..., H]`.
        weight: `[H]`, frozen, in the dtype of x.
        epsilon: of the root.

    Returns:
        `[..., H]`, with gradients for x.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), epsilon=0.0) * 12.5**0.5
    tensor([[3., 4.]])
    """
    output = _RMSNorm.apply(x, weight, epsilon)
    assert isinstance(output, Tensor)
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        for x_part, scale_part, output_part in zip(*map(in_parts, (x, scale, output)), strict=True):
            wide = x_part.to(scale.dtype)
            torch.rsqrt((wide * wide).mean(-1, keepdim=True).add_(epsilon), out=scale_part)
            output_part.copy_(wide * scale_part).mul_(weight)
        ctx.save_for_backward(x, scale, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        for grad_part, x_part, scale_part, x_grad_part in zip(*map(in_parts, (grad, x, scale, x_grad)), strict=True):
            normed = x_part.to(scale.dtype) * scale_part
            normed_grad = (grad_part * weight).to(scale.dtype)
            parallel = (normed_grad * normed).mean(-1, keepdim=True)
            x_grad_part.copy_(normed_grad.addcmul_(normed, parallel, value=-1).mul_(scale_part))
        return x_grad, None, None
