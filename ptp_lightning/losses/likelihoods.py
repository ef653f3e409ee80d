"""Losses that compare a slot's prediction with the reference token: cross entropy and binary cross entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_lightning.losses.base import Loss
from ptp_lightning.sampling import TokenDistribution


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """`-log P_theta(t_k | ...)`, the negative log-likelihood of the reference token (paper, Algorithms 2 and 3).

    The loss of one-hot PTP, which can reach 0, and of teacher-free training. For categorical PTP and the independent
    baseline it is an unbiased, noisier estimate of the divergence: the reference token is a sample from the teacher, so
    both have the same expected gradient.

    >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> CrossEntropy().per_slot(logits, torch.tensor([1]), None)  # -log(1/4)
    tensor([1.3863])
    """

    needs_target: ClassVar[bool] = False
    sound_for: ClassVar[frozenset[str]] = frozenset({"one_hot", "categorical", "independent", "sequential"})
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `target` is not read."""
        return F.cross_entropy(logits, token_ids, reduction="none")

    def with_gradients(
        self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None, out: Tensor
    ) -> Tensor:
        """See `Loss.with_gradients`: P minus 1 at the reference token, from one softmax and the maximum of each row."""
        probabilities = out if out.dtype == logits.dtype else torch.empty_like(logits)
        torch.softmax(logits, -1, out=probabilities)
        reference = token_ids.unsqueeze(-1)
        margin = logits.amax(-1) - logits.gather(-1, reference).squeeze(-1)
        nats = margin - probabilities.amax(-1).log()
        probabilities.scatter_add_(-1, reference, probabilities.new_full(reference.shape, -1.0))
        if probabilities is not out:
            out.copy_(probabilities)
        return nats


NOT_A_DISTRIBUTION = (
    "it trains one binary decision per vocabulary entry. If the token is not determined, the optimal decisions are "
    "sigmoid(z_v) = Q_k(v); tokens are drafted from the softmax of these logits, which is proportional to "
    "Q_k / (1 - Q_k) instead of Q_k"
)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """`-log s(z_t) - sum_{v != t} log(1 - s(z_v))`, s the logistic sigmoid: binary cross entropy per vocabulary entry.

    The paper's second choice for one-hot PTP. Each vocabulary entry v is a separate decision (is the token v?), so the
    logits z do not compete through a softmax. At the optimum their argmax is the most likely token even if the student
    is uncertain. The sum runs over all V entries; it is 0 if all decisions are certain and correct.

    >>> BinaryCrossEntropy().per_slot(torch.zeros(1, 3), torch.tensor([1]), None)  # three undecided entries: 3 log 2
    tensor([2.0794])
    """

    needs_target: ClassVar[bool] = False
    sound_for: ClassVar[frozenset[str]] = frozenset({"one_hot"})
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(
        dict.fromkeys(("categorical", "independent", "sequential"), NOT_A_DISTRIBUTION)
    )

    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `target` is not read."""
        reference = token_ids.unsqueeze(-1)
        # 1 - s(z) = s(-z): every decision is a log-sigmoid of its logit with the sign of the correct answer.
        signed = (-logits).scatter(-1, reference, logits.gather(-1, reference))
        return -F.logsigmoid(signed).sum(-1)
