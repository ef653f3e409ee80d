"""MarkovHead: a low-rank bias on a slot's logits, given the token that the slot stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

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
class MarkovHead(HeadCorrection):
    """`logits + B A rms(e)`, with the base model's embedding e of the token that the slot stands for.

    The bias is a bigram model of low rank, as in DSpark (arXiv:2607.05147), which looks up A by token ids. B has a row
    for each token that slots can draft, so a `predictor.draft_vocabulary` makes it smaller.

    Args:
        rank: of the bias, the rows of A.
        order: see `HeadCorrection`.
        num_refinement_steps: see `HeadCorrection`.

    Raises:
        ValueError: a value is out of range; names the key.
    """

    rank: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("rank", self.rank, 1)

    def build(self, model: PreTrainedModel, num_logits: int) -> MarkovModule:
        """See `Correction.build`."""
        return MarkovModule(cast(int, model.config.hidden_size), num_logits, self.rank)


class MarkovModule(CorrectionHead):
    """The module of `MarkovHead`; B starts at zero. B is named like embeddings, which Muon leaves to AdamW.

    Args:
        hidden_size: H.
        num_logits: N.
        rank: F.

    >>> head = MarkovModule(hidden_size=8, num_logits=5, rank=2)
    >>> corrected = head(torch.randn(3, 8), token_embeddings=torch.randn(3, 8))
    >>> corrected.shape, head.logit_bias(corrected[:, 8:]).shape
    (torch.Size([3, 10]), torch.Size([3, 5]))
    """

    def __init__(self, hidden_size: int, num_logits: int, rank: int) -> None:
        super().__init__()
        self.encode = nn.Linear(hidden_size, rank, bias=False)
        self.unembedding = nn.Linear(rank, num_logits, bias=False)
        nn.init.normal_(self.encode.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.unembedding.weight)

    def forward(self, hidden: Tensor, token_embeddings: Tensor) -> Tensor:
        """See `CorrectionHead.forward`; the hidden states stay, the features are `A rms(e)`."""
        features = self.encode(normalized(token_embeddings, self.encode))
        return torch.cat([hidden.to(features.dtype), features], dim=-1)

    def logit_bias(self, features: Tensor) -> Tensor:
        """See `CorrectionHead.logit_bias`."""
        return self.unembedding(features)

    def next_logits(self, hidden: Tensor, head: SlotHead) -> NextLogits:
        """See `CorrectionHead.next_logits`: the output head runs once, for all slots."""
        logits = head(hidden)

        def next_logits(slot: int, token_embeddings: Tensor) -> Tensor:
            bias = self.logit_bias(self.encode(normalized(token_embeddings, self.encode)))
            return logits[:, slot : slot + 1] + bias

        return next_logits
