"""LowerLayers: the base model's first layers, which encode drafted tokens for the refiner.

They are frozen and pretrained. So the refiner reads what the base model knows of a token in its context; a layer that
reads embeddings would have to learn that.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptp_lightning.models.attention.dispatch import run_layers
from ptp_lightning.models.attention.interface import WindowKeys
from ptp_lightning.models.layers.decoder_stack import decoder_stack
from ptp_lightning.models.lora.gate import Gate

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class LowerLayers:
    """A view of a causal LM's first layers and its last norm. It owns no weights and is no module of its own.

    Args:
        model: the base model, with its adapter if it has one.
        num_layers: number of layers, at least one.
        gate: of the adapter, which stays closed here.

    Raises:
        ValueError: the model has fewer layers, or its list of layers is not found.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, gate: Gate) -> None:
        decoder, name, layers = decoder_stack(
            model,
            num_layers,
            "predictor.correction.init_args.base_layers",
            "set predictor.correction.init_args.base_layers to 0",
        )
        # A shallow copy with a shorter list of layers runs the model's own forward, with its masks and positions.
        shallow: Any = copy.copy(decoder)
        shallow._modules = decoder._modules | {name: nn.ModuleList(list(layers)[:num_layers])}
        shallow._forward_hooks, shallow._forward_pre_hooks = OrderedDict(), OrderedDict()  # they count whole calls
        shallow.config = copy.copy(model.config)
        shallow.config.num_hidden_layers = num_layers
        self._decoder = shallow
        self._model = model
        self._gate = gate

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' weights."""
        return self._model.dtype

    @torch.no_grad()
    def __call__(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        *,
        window_keys: WindowKeys | None = None,
    ) -> Tensor:
        """Hidden states `[B, T, H]` after these layers and the last norm.

        Args:
            embeddings: `[B, T, H]`, of the tokens.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached keys; None with `window_keys`.
            cache: of these layers alone; gets the keys and values of these T tokens appended.
            window_keys: what the positions see in a call that reads windows.
        """
        with self._gate.closed():
            return run_layers(self._decoder, embeddings.to(self.dtype), position_ids, mask, cache, window_keys)
