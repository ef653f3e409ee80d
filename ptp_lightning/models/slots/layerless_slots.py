"""LayerlessSlots: slots that run through no layer, made of what the base model has computed for the token before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.models.correction.normalization import normalized
from ptp_lightning.models.layers.quantized_linear import DraftLinear

EXPANSION = 2  # width of the MLP in units of the model's width


class LayerlessSlots(nn.Module):
    """In place of all layers: `s g rms(W_1 [rms(h), rms(e)] + W_2 silu(W_3 [rms(h), rms(e)] + W_4 rms(x) + b_j))`.

    h is the base model's last hidden state of the last token before the window, which knows the whole text. e is the
    embedding of the window's first token, which is known before its slots are made. x is what slot j would read if it
    ran through the layers, and b_j tells its position. s is the root mean square of h, the scale of what the output
    head reads, and g a learned vector. The heads of Medusa, Hydra and EAGLE draft from h likewise.

    Args:
        hidden_size: H.
        num_slots: J, of a window. Later slots take the last position.
        reads_slots: whether x differs between slots; without, the term is left out.
        of_bfloat16_model: see `DraftLinear`.

    >>> make = LayerlessSlots(hidden_size=8, num_slots=3)
    >>> slots, of_window = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 8)  # 2 rows, 5 windows, 3 slots
    >>> make(slots, of_window, of_window).shape
    torch.Size([2, 5, 3, 8])
    """

    def __init__(
        self, hidden_size: int, num_slots: int, reads_slots: bool = True, of_bfloat16_model: bool = False
    ) -> None:
        super().__init__()
        self._width = width = EXPANSION * hidden_size
        self.from_window = DraftLinear(2 * hidden_size, width + hidden_size, bias=False)  # W_3 and W_1 in one product
        self.from_slot = DraftLinear(hidden_size, width, bias=False) if reads_slots else None
        self.down = DraftLinear(width, hidden_size, bias=False)
        self.positions = nn.Parameter(torch.empty(num_slots, width))
        self.gain = nn.Parameter(torch.ones(hidden_size))
        for layer in (self.from_window, self.from_slot):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.positions)
        nn.init.zeros_(self.down.weight)
        for layer in (self.from_window, self.from_slot, self.down):
            if layer is not None:
                layer.of_bfloat16_model = of_bfloat16_model

    def forward(self, slots: Tensor, last_hidden: Tensor, first_embeddings: Tensor) -> Tensor:
        """Hidden states for the output head.

        Args:
            slots: `[..., J, H]`, x.
            last_hidden: `[..., H]`, h.
            first_embeddings: `[..., H]`, e.

        Returns:
            `[..., J, H]`.
        """
        known = torch.cat([normalized(states, self.down) for states in (last_hidden, first_embeddings)], dim=-1)
        of_window = self.from_window(known).unsqueeze(-2)
        position = torch.arange(slots.shape[-2], device=slots.device).clamp_max(len(self.positions) - 1)
        inner = of_window[..., : self._width] + self.positions[position]
        if self.from_slot is not None:
            inner = inner + self.from_slot(normalized(slots, self.from_slot))
        scale = last_hidden.to(inner.dtype).square().mean(dim=-1, keepdim=True).sqrt()
        states = normalized(of_window[..., self._width :] + self.down(F.silu(inner)), self.down)
        return scale.unsqueeze(-2) * self.gain * states
