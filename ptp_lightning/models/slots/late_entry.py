"""Late slots, which run through the last layers of the stack alone: at which layer they enter, and what they read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ptp_lightning.models.attention.sliding_window import has_sliding_window
from ptp_lightning.models.correction.normalization import normalized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INITIAL_GAIN = 0.25  # of all that is added at the start to the stream of the token before


class LateEntry(nn.Module):
    """What a slot reads that enters the stack at layer k: `s (rms(h_k) + W [rms(h_k), rms(h), rms(e), rms(x)])`.

    h_k and h are the base model's hidden states of the last token before the window, at the input of layer k and after
    the last layer. e is the embedding of the window's first token, which is known before its slots run. x is what the
    slot would read if it entered at the first layer. s is the root mean square of h_k: the scale of what layer k reads.

    The layers below k have made h_k from the whole text, so that slots need not run through them (EAGLE and its
    successors draft from hidden states of the base model likewise, with layers of their own).

    Args:
        hidden_size: H.

    >>> entry = LateEntry(hidden_size=8)
    >>> slots, of_window = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 8)  # 2 rows, 5 windows, 3 slots
    >>> entry(slots, of_window, of_window, of_window).shape
    torch.Size([2, 5, 3, 8])
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.from_window = nn.Linear(3 * hidden_size, hidden_size, bias=False)
        self.from_slot = nn.Linear(hidden_size, hidden_size, bias=False)
        for layer in (self.from_window, self.from_slot):
            nn.init.normal_(layer.weight, std=INITIAL_GAIN * (4 * hidden_size) ** -0.5)

    def forward(self, slots: Tensor, entry_hidden: Tensor, last_hidden: Tensor, first_embeddings: Tensor) -> Tensor:
        """Input of layer k.

        Args:
            slots: `[..., J, H]`, x.
            entry_hidden: `[..., H]`, h_k.
            last_hidden: `[..., H]`, h.
            first_embeddings: `[..., H]`, e.

        Returns:
            `[..., J, H]`.
        """
        known = [normalized(states, self.from_window) for states in (entry_hidden, last_hidden, first_embeddings)]
        of_window = known[0] + self.from_window(torch.cat(known, dim=-1))
        scale = entry_hidden.to(of_window.dtype).square().mean(dim=-1, keepdim=True).sqrt()
        of_slots = self.from_slot(normalized(slots, self.from_slot))
        return scale.unsqueeze(-2) * (of_window.unsqueeze(-2) + of_slots)


def first_slot_layer(model: PreTrainedModel, slot_layers: int | None) -> int:
    """Index of the first decoder layer that slots run through.

    Args:
        model: the base model.
        slot_layers: number of layers, from the last one; None for all. With 0 the index is that after the last layer.

    Raises:
        ValueError: it has fewer layers, or slots cannot enter it above the first.
    """
    if slot_layers is None:
        return 0
    num_layers = model.config.get_text_config().num_hidden_layers
    if slot_layers > num_layers:
        raise ValueError(f"expected predictor.slot_layers null or <= {num_layers} (all layers), found {slot_layers}")
    if 0 < slot_layers < num_layers and not _can_enter_late(model):
        raise ValueError(
            f"expected a base model whose layers are one list of equal ones beside predictor.slot_layers, found "
            f"{model.config.model_type}: set predictor.slot_layers to null"
        )
    return num_layers - slot_layers


def _can_enter_late(model: PreTrainedModel) -> bool:
    """Whether slots can enter a model above its first layer: one list of layers, all of one kind."""
    layers = getattr(getattr(model, model.base_model_prefix), "layers", None)
    types = getattr(model.config, "layer_types", None)
    return isinstance(layers, nn.ModuleList) and not has_sliding_window(model.config) and len(set(types or ())) < 2
