"""Sliding windows: layers in which a token sees only the last W tokens of its document, itself included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers, as transformers names them


def has_sliding_window(config: PreTrainedConfig) -> bool:
    """Whether some layers of a model have a sliding window.

    >>> from transformers import MistralConfig
    >>> has_sliding_window(MistralConfig(sliding_window=8)), has_sliding_window(MistralConfig(sliding_window=None))
    (True, False)
    """
    types = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (types is None or SLIDING in types)


def layer_masks(config: PreTrainedConfig, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """The masks of a model's layers, as its decoder takes them: one for all, or one for each type of layer.

    Args:
        config: of the model.
        mask: `[B, 1, T, K]` bool of full attention, see `within_window`.
    """
    if not has_sliding_window(config):
        return mask
    windowed = within_window(mask, config.sliding_window)
    return windowed if getattr(config, "layer_types", None) is None else {FULL: mask, SLIDING: windowed}


def within_window(mask: Tensor, size: int) -> Tensor:
    """Hide all keys but the last `size` that a query sees.

    These are the tokens nearest to the query, because in all masks of this package a query sees each token of its
    document up to itself exactly once, in ascending order of keys.

    Args:
        mask: `[.., K]` bool, true where a query sees a key.
        size: W, of the window.

    >>> import torch
    >>> within_window(torch.tensor([[True, False, True, True, False]]), 2)
    tensor([[False, False,  True,  True, False]])
    """
    num_from_here = mask.flip(-1).cumsum(-1).flip(-1)  # of the keys that are seen, from each one to the last
    return mask & (num_from_here <= size)
