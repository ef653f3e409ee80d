"""The choice of an attention back-end for the windows of a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ptp_lightning.models.attention.blocks import Blocks
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.models.attention.flex import Flex
from ptp_lightning.models.attention.interface import WindowAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FASTEST_FIRST: tuple[WindowAttention, ...] = (Flex(), Blocks(), Dense())
logger = logging.getLogger(__name__)


class AttentionChoice:
    """Chooses the first supported back-end, once for each device and dtype.

    Args:
        model: the base model.
        candidates: in order of preference; one alone is always chosen, for comparisons.
        is_logged: whether a choice is logged.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> AttentionChoice(model).choose(torch.device("cpu"), torch.float32).name
    'blocks'
    """

    def __init__(
        self,
        model: PreTrainedModel,
        candidates: Sequence[WindowAttention] = FASTEST_FIRST,
        is_logged: bool = True,
    ) -> None:
        self._model = model
        self._is_logged = is_logged
        self._candidates = candidates
        self._chosen: dict[tuple[str, torch.dtype], WindowAttention] = {}

    def choose(self, device: torch.device, dtype: torch.dtype) -> WindowAttention:
        """The back-end for layers on a device.

        Args:
            device: of the layers.
            dtype: of their weights.
        """
        if torch.is_autocast_enabled(device.type):
            # Queries and keys are rotated in float32, values are not: no kernel for 16-bit numbers takes both.
            dtype = torch.float32
        key = device.type, dtype
        if key not in self._chosen:
            self._chosen[key] = self._first_supported(device, dtype)
            if self._is_logged:
                logger.info("Windows attend by %s on %s in %s", self._chosen[key].name, device.type, dtype)
        return self._chosen[key]

    def _first_supported(self, device: torch.device, dtype: torch.dtype) -> WindowAttention:
        if len(self._candidates) == 1:
            return self._candidates[0]
        return next(one for one in self._candidates if one.is_supported(self._model, device, dtype))
