"""How many positions a base model has for a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

LONG_ROPE = "longrope"
ORIGINAL_POSITIONS = "original_max_position_embeddings"


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model computes alike in every call, if it has a limit.

    With RoPE of the type "longrope" (Phi-3-mini-128k, for one), transformers uses one set of frequencies for all
    positions of a call up to the original number of positions, and another set if the largest position of the call is
    beyond it. A token's keys would then depend on slots, drafts and other texts in its call. Below the original number
    the first set always holds. Frequencies of the type "dynamic" change beyond `max_position_embeddings` alone.

    Args:
        config: of the model.

    >>> from transformers import LlamaConfig
    >>> max_positions(LlamaConfig(max_position_embeddings=512))
    512
    """
    limits = [getattr(config, "max_position_embeddings", None), long_rope_positions(config)]
    return min((limit for limit in limits if limit is not None), default=None)


def long_rope_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions up to which a model with RoPE of the type "longrope" keeps its frequencies, else None."""
    found = [one[ORIGINAL_POSITIONS] for one in _rope_parameters(config) if one.get("rope_type") == LONG_ROPE]
    return min(found, default=None)


def _rope_parameters(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Those of all layers, or of each type of layer."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    yield from (one for one in parameters.values() if isinstance(one, dict) and "rope_type" in one)
