"""The decoder layers of a causal LM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(models: Iterable[PreTrainedModel], hint: str) -> list[nn.Module]:
    """All decoder layers of some causal LMs, first to last.

    Args:
        models: the causal LMs.
        hint: what to set if the layers are not found, for errors.

    Raises:
        ValueError: a model has no single list of its layers.
    """
    return [layer for model in models for layer in _layers_of(model, hint)]


def _layers_of(model: PreTrainedModel, hint: str) -> nn.ModuleList:
    decoder: nn.Module = getattr(model, model.base_model_prefix)
    depth = model.config.num_hidden_layers
    lists = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(lists) != 1:
        raise ValueError(f"expected one list of {depth} layers in {type(decoder).__name__}, found {len(lists)}: {hint}")
    return lists[0]
