"""TokenConditionedHead: an MLP that corrects a slot's last hidden state, given the token that the slot stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.models.correction.correction import (
    CorrectionHead,
    HeadCorrection,
    NextLogits,
    SlotHead,
    require_at_least,
)
from ptp_lightning.models.correction.normalization import normalized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenConditionedHead(HeadCorrection):
    """`h + W_down silu(W_up [rms(h), rms(e)])`, followed by the base model's output head.

    h is the slot's last hidden state and e the base model's embedding of the token that the slot stands for. It needs
    no attention: the knowledge of one token gains nearly as much as a decoder layer (`docs/results/training.md`).

    Args:
        intermediate_size: W, width of the hidden layer.
        order: see `HeadCorrection`.
        num_refinement_steps: see `HeadCorrection`.

    Raises:
        ValueError: a value is out of range; names the key.
    """

    intermediate_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("intermediate_size", self.intermediate_size, 1)

    def build(self, model: PreTrainedModel, num_logits: int) -> TokenConditionedModule:
        """See `Correction.build`."""
        return TokenConditionedModule(cast(int, model.config.hidden_size), self.intermediate_size)


class TokenConditionedModule(CorrectionHead):
    """The module of `TokenConditionedHead`; `W_down` starts at zero.

    Args:
        hidden_size: H.
        intermediate_size: W.

    >>> head = TokenConditionedModule(hidden_size=8, intermediate_size=4)
    >>> hidden, token_embeddings = torch.randn(2, 3, 8)
    >>> bool((head(hidden, token_embeddings) == hidden).all())
    True
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        nn.init.normal_(self.up.weight, std=(2 * hidden_size) ** -0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor, token_embeddings: Tensor) -> Tensor:
        """See `CorrectionHead.forward`; F is 0."""
        joined = torch.cat([normalized(hidden, self.up), normalized(token_embeddings, self.up)], dim=-1)
        return self._corrected(hidden, self.up(joined))

    def next_logits(self, hidden: Tensor, head: SlotHead) -> NextLogits:
        """See `CorrectionHead.next_logits`: the half of `W_up` that reads hidden states runs for all slots at once."""
        of_hidden, of_tokens = self.up.weight.chunk(2, dim=1)
        from_hidden = F.linear(normalized(hidden, self.up), of_hidden)

        def next_logits(slot: int, token_embeddings: Tensor) -> Tensor:
            own = slice(slot, slot + 1)
            from_token = F.linear(normalized(token_embeddings, self.up), of_tokens)
            return head(self._corrected(hidden[:, own], from_hidden[:, own] + from_token))

        return next_logits

    def _corrected(self, hidden: Tensor, inner: Tensor) -> Tensor:
        return hidden + self.down(F.silu(inner)).to(hidden.dtype)
