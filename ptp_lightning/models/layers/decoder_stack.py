"""The decoder layers of a causal LM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecoderStack(NamedTuple):
    """The decoder layers and the module that runs them.

    Attributes:
        decoder: the module.
        name: of the list of layers in it.
        layers: first to last.
    """

    decoder: nn.Module
    name: str
    layers: nn.ModuleList


def decoder_stack(model: PreTrainedModel, num_layers: int, key: str, hint: str) -> DecoderStack:
    """Find the decoder layers of a model.

    Args:
        model: a causal LM.
        num_layers: how many of them the caller needs.
        key: configuration key of `num_layers`, for errors.
        hint: what to set if the layers are not found, for errors.

    Raises:
        ValueError: the model has fewer layers, or no single list of them.
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
            f"expected one list of {depth} layers in {type(decoder).__name__}, found {len(stacks)}: {hint}"
        )
    return DecoderStack(decoder, *stacks[0])


def decoder_layers(models: Iterable[PreTrainedModel], hint: str) -> list[nn.Module]:
    """All decoder layers of some models; `hint` and errors as in `decoder_stack`."""
    stacks = [decoder_stack(model, model.config.num_hidden_layers, "num_hidden_layers", hint) for model in models]
    return [layer for stack in stacks for layer in stack.layers]
