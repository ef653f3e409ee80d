"""The output head of a causal language model: last hidden states to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `[..., V]` of hidden states `[..., H]`."""
    head = output_head(model)
    weight: Tensor = head.weight  # pyright: ignore[reportAssignmentType]
    return final_logits(model.config, head(hidden.to(weight.dtype)))


def final_logits(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What a model makes of the output of its head: scaled (Cohere, Granite) and softly capped (Gemma) logits.

    >>> from transformers import GraniteConfig
    >>> final_logits(GraniteConfig(logits_scaling=4.0), torch.tensor([8.0]))
    tensor([2.])
    """
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits; raises ValueError if there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"expected a causal language model with an output head, found {type(model).__name__} without: set "
            "predictor.backbone.path"
        )
    return head
