"""Steady attention: a token's hidden state in bfloat16 does not depend on what else its call reads.

Decoders promise equal texts, though one reads a token alone and the other in front of a draft. Kernels for one query
and for several sum in another order, and where a sum lies next to the border between two bfloat16 numbers, the result
is rounded otherwise; a few layers later every hidden state differs, and near-ties of tokens break the other way. On a
CPU linear layers treat each row alike, and attention is what differs. In float64 its sums differ by so little that no
border lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_in_float64"


@contextmanager
def steady_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, attention of a bfloat16 model on a CPU is computed in float64. Other models stay as they are.

    In float32 the differences are a thousand times smaller than what parts tokens; on a GPU linear layers differ, too.
    """
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        yield
        return
    _register()
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As attention functions of transformers: `[B, heads, T, head size]` to `[B, T, heads, head size]`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attended, _ = sdpa_attention_forward(module, query.double(), key.double(), value.double(), attention_mask, **kwargs)
    return attended.to(query.dtype), None
