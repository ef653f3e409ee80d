"""The output head of a causal language model: last hidden states to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `[..., V]` of hidden states `[..., H]`."""
    head = output_head(model)
    weight: Tensor = head.weight  # pyright: ignore[reportAssignmentType]
    return head(hidden.to(weight.dtype))


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits; raises ValueError if there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"expected a causal language model with an output head, found {type(model).__name__} without: set "
            "predictor.backbone.path"
        )
    return head


@torch.no_grad()
def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse models that scale or cap their logits after the head, because losses apply the head alone."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    decoder = getattr(model, model.base_model_prefix)
    expected = model(input_ids=token, use_cache=False).logits
    if not expected.isfinite().all():
        raise ValueError(
            "expected finite logits of the base model, found a NaN or infinity: its weights are broken, set "
            "predictor.backbone.path"
        )
    found = output_head(model)(decoder(input_ids=token, use_cache=False).last_hidden_state)
    if not torch.allclose(expected, found, atol=1e-3, rtol=1e-3):
        raise ValueError(
            f"expected logits = head(last hidden state), found that {type(model).__name__} changes them afterwards "
            "(scaling or capping), which is not supported: choose another predictor.backbone.path"
        )
