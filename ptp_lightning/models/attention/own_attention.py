"""Attention that only the model itself computes: capped scores (Gemma-2) and attention sinks (GPT-OSS).

torch's `scaled_dot_product_attention` has neither, so transformers runs such models by a function of their own, named
`eager_attention_forward` in each model's module. It is kept, and given masks of ours. Windows are read by dense masks.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_ATTENTION = "own_attention"
OWN_ATTENTION_IN_FLOAT64 = "own_attention_in_float64"


def has_own_attention(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether transformers has no SDPA attention of a model, but lets its attention function be exchanged."""
    return bool(model._supports_attention_backend and not model._supports_sdpa)


def register_own_attention() -> None:
    """Make both functions known to transformers, under `OWN_ATTENTION` and `OWN_ATTENTION_IN_FLOAT64`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(OWN_ATTENTION, attend_as_the_model)
    AttentionInterface.register(OWN_ATTENTION_IN_FLOAT64, attend_in_float64)
    for name in (OWN_ATTENTION, OWN_ATTENTION_IN_FLOAT64):
        AttentionMaskInterface.register(name, eager_mask)


def attend_as_the_model(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """An attention function of transformers: `[B, heads, T, head size]` to `[B, T, heads, head size]`.

    Args:
        module: the attention module of a layer.
        query: of the T positions of the call.
        key: of the P + T positions that they see.
        value: likewise.
        attention_mask: `[B, 1, T, P + T]`, bool (true where a query sees a key) or added to the scores.
        **kwargs: further arguments of transformers, among them those of the model's own function.
    """
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, _added(attention_mask, query.dtype), **kwargs)


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
    """The same in float64, rounded to the dtype of the model, for `batch_invariant`; arguments as above.

    Args:
        module: the attention module of a layer.
        query: as above.
        key: as above.
        value: as above.
        attention_mask: as above.
        scaling: factor of scores.
        softcap: c, where scores s become c tanh(s / c).
        s_aux: `[heads]`, a score of each head that takes probability from all keys.
        **kwargs: not read.
    """
    del module, kwargs
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    keys, values = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    mask = _added(attention_mask, scores.dtype)
    if mask is not None:
        scores = scores + mask.double()
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    weights = scores.softmax(dim=3)[..., : key.shape[2]]
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous(), None


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as it is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
