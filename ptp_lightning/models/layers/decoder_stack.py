"""Where a causal LM keeps its decoder layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecoderStack(NamedTuple):
    """Attributes: the module that runs the layers, its name for their list, and the layers, first to last."""

    decoder: nn.Module
    name: str
    layers: nn.ModuleList


def decoder_stack(model: PreTrainedModel, num_layers: int, key: str, instead: str) -> DecoderStack:
    """Find the layers of which some are wanted.

    Args:
        model: a causal LM.
        num_layers: how many are wanted.
        key: of the configuration that asks for them, for errors.
        instead: what to do where the layers are not found, likewise.

    Raises:
        ValueError: the model has fewer, or keeps them in a way that is not known.
    """
    decoder: nn.Module = getattr(model, model.base_model_prefix)
    depth = cast(int, model.config.num_hidden_layers)
    if num_layers > depth:
        raise ValueError(f"expected {key} <= {depth} (the base model's layers), found {num_layers}")
    stacks = [
        (name, part)
        for name, part in decoder.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == depth
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"expected one list of {depth} layers in {type(decoder).__name__}, found {len(stacks)}: {instead}"
        )
    return DecoderStack(decoder, *stacks[0])


def decoder_layers(models: Iterable[PreTrainedModel], instead: str) -> list[nn.Module]:
    """All layers of some models; `instead` and errors as in `decoder_stack`."""
    stacks = [decoder_stack(model, model.config.num_hidden_layers, "num_hidden_layers", instead) for model in models]
    return [layer for stack in stacks for layer in stack.layers]
