"""Eager attention: of models with capped scores (Gemma-2) or attention sinks (GPT-OSS), which have no SDPA.

torch's `scaled_dot_product_attention` has neither. transformers runs such models by `eager_attention_forward` of the
model's own module. Here that function gets our masks, and decoding gets a version in float64. Windows are read under
dense masks.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EAGER = "eager_with_boolean_masks"
EAGER_IN_FLOAT64 = "eager_in_float64"


def needs_eager_attention(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether transformers has no SDPA of a model, but lets its attention function be exchanged."""
    return bool(model._supports_attention_backend and not model._supports_sdpa)


def register_eager_attention(*, in_float64: bool = False) -> str:
    """Register `attend_eagerly` or `attend_in_float64` in transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    name, function = (EAGER_IN_FLOAT64, attend_in_float64) if in_float64 else (EAGER, attend_eagerly)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    return name


def attend_eagerly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The model's own function; `[B, heads, T, head size]` to `[B, T, heads, head size]`.

    Args:
        module: the attention module of a layer.
        query: of the T positions of the call.
        key: of the P + T positions that they see.
        value: likewise.
        attention_mask: `[B, 1, T, P + T]`, bool (true where a query sees a key) or added to the scores.
        **kwargs: further arguments of transformers, among them those of the model's own function.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, _additive(attention_mask, query.dtype), **kwargs)


def attend_in_float64(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in float64, rounded to the model's dtype, for `batch_invariant`; shapes as `attend_eagerly`.

    Args:
        module: not read.
        query: of the T positions of the call.
        key: of the P + T positions that they see.
        value: likewise.
        attention_mask: as in `attend_eagerly`.
        scaling: factor of scores.
        softcap: c, where scores s become c tanh(s / c).
        s_aux: attention sinks `[heads]`, scores that take probability from all keys.
        **kwargs: not read.
    """
    del module, kwargs
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    keys, values = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    mask = _additive(attention_mask, scores.dtype)
    if mask is not None:
        scores = scores + mask.double()
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    weights = scores.softmax(dim=3)[..., : key.shape[2]]
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as it is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
