"""The base model's first layers, run on known tokens: what can be said of a drafted token for a part of a call.

They are frozen and pretrained, so a token arrives with what the base model itself knows of it in its context, which a
layer that starts from an embedding would have to learn anew.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptp_lightning.models.layers.decoder_stack import decoder_stack
from ptp_lightning.models.lora.gate import Gate

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class LowerLayers:
    """A view of a causal LM's first layers and its last norm; it owns no weights and is no module of its own.

    Args:
        model: the base model, with its adapter where it has one.
        num_layers: how many, at least one.
        gate: of the adapter, which never acts here.

    Raises:
        ValueError: the model has fewer layers, or keeps them in a way that is not known.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, gate: Gate) -> None:
        decoder, name, layers = decoder_stack(
            model, num_layers, "predictor.refiner.base_layers", "set predictor.refiner.base_layers to 0"
        )
        # A shallow copy with fewer entries in the one list runs the model's own forward, masks and positions included.
        shallow: Any = copy.copy(decoder)
        shallow._modules = decoder._modules | {name: nn.ModuleList(list(layers)[:num_layers])}
        shallow._forward_hooks, shallow._forward_pre_hooks = OrderedDict(), OrderedDict()  # not for this part of a call
        shallow.config = copy.copy(model.config)
        shallow.config.num_hidden_layers = num_layers
        self._decoder = shallow
        self._model = model
        self._gate = gate

    @torch.no_grad()
    def __call__(
        self, embeddings: Tensor, position_ids: Tensor, mask: Tensor, cache: Cache | None, **more: Any
    ) -> Tensor:
        """Hidden states of tokens after these layers and the last norm.

        Args:
            embeddings: `[B, T, H]`, of the tokens.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached keys.
            cache: of these layers alone; gets the keys and values of these T tokens appended.
            more: for the layers' attention.

        Returns:
            `[B, T, H]`.
        """
        with self._gate.closed():
            return self._decoder(
                inputs_embeds=embeddings.to(self._model.dtype),
                position_ids=position_ids,
                attention_mask=mask,
                cache=cache,
                use_cache=cache is not None,
                **more,
            ).last_hidden_state
