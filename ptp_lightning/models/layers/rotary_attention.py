"""Attention layers of transformers that rotate queries and keys in place, for the training of windows.

Transformers' rotation makes five tensors as large as all queries, which live for one operation each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ptp_lightning.models.layers.row_parts import in_batch_parts

SUPPORTED_ATTENTION = frozenset(
    {
        "transformers.models.cwm.modeling_cwm.CwmAttention",
        "transformers.models.gemma.modeling_gemma.GemmaAttention",
        "transformers.models.granite.modeling_granite.GraniteAttention",
        "transformers.models.llama.modeling_llama.LlamaAttention",
        "transformers.models.ministral.modeling_ministral.MinistralAttention",
        "transformers.models.mistral.modeling_mistral.MistralAttention",
        "transformers.models.qwen2.modeling_qwen2.Qwen2Attention",
    }
)
"""Attention layers of transformers that only project, rotate the halves of heads, and attend."""


class MemoryEfficientAttention(nn.Module):
    """An attention layer that rotates in place where windows are trained; in any other case the one that it replaces.

    Args:
        attention: one of `SUPPORTED_ATTENTION`, whose parts are taken over.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(attention))
        self.library_class = type(attention)

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As those of transformers: `[B, T, H]` to the same, and no weights."""
        if not self._rotates_in_place(hidden_states, **kwargs):
            return self.library_class.forward(
                self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
        assert position_embeddings is not None, "rotary models compute them once for all layers"
        query, key, value = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (rotate_in_place(part, *position_embeddings) for part in (query, key))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        attended, _ = self._attention_function()(
            self, query, key, value, attention_mask, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attended.flatten(2).contiguous()), None

    def _attention_function(self: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]

    @staticmethod
    def _rotates_in_place(hidden_states: Tensor, window_keys: Any = None, cache: Any = None, **kwargs: Any) -> bool:
        """Where windows are read, gradients are wanted, no compiler fuses, and products have the dtype of their input.

        Under autocast they do not: the rotation is in float32 there.
        """
        if window_keys is None or cache is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not torch.is_autocast_enabled(hidden_states.device.type)


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of every head against each other.

    Args:
        x: `[B, T, heads * D]`, which no other operation needs for its gradients.
        cos: `[B or 1, T, D]`, both halves the same.
        sin: as `cos`.

    Returns:
        x, with gradients.

    >>> quarter_turn = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> rotate_in_place(torch.tensor([[[3.0, 4.0]]]), *quarter_turn)
    tensor([[[-4.,  3.]]])
    """
    output = _Rotation.apply(x, cos, sin)
    assert isinstance(output, Tensor)
    return output


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
    """Rotate x `[B, T, heads * D]` in place; on a CPU a part of the batch at a time."""
    half = cos.shape[-1] // 2
    heads = x.unflatten(-1, (-1, 2, half))
    cos, sin = (table[..., :half].unsqueeze(-2).expand(len(x), -1, -1, -1) for table in (cos, sin))
    for part, cos_part, sin_part in zip(*map(in_batch_parts, (heads, cos, sin)), strict=True):
        first, second = part.unbind(-2)
        original = first.clone()
        first.mul_(cos_part).addcmul_(second, sin_part, value=-1)
        second.mul_(cos_part).addcmul_(original, sin_part)
