"""The negative logarithm of the overlap of student and target, whose gradient does not vanish far from the optimum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from ptp_lightning.losses.base import Loss
from ptp_lightning.losses.divergences import TotalVariation
from ptp_lightning.sampling import TokenDistribution

LARGEST_VARIATION = 0.5
"""Up to here the overlap is `1 - total variation`, which is exactly 1 at equality; above, it is computed directly."""


@dataclass(frozen=True)
class NegativeLogOverlap(Loss):
    """`-log sum_t min(P_k(t), Q_k(t))`, in nats: 0 where student P and target Q are equal (LK loss, arXiv:2602.23881).

    The overlap is the largest probability with which two samplers can agree. Its gradient is that of the total
    variation divided by the overlap, so it is as large for a student that is far away as for one that is close.

    >>> P, Q = torch.tensor([[0.5, 0.5]]), TokenDistribution(torch.tensor([[0.75, 0.25]]))
    >>> NegativeLogOverlap().per_slot(P.log(), torch.tensor([0]), Q)  # -log(0.5 + 0.25)
    tensor([0.2877])
    """

    needs_target: ClassVar[bool] = True
    sound_for: ClassVar[frozenset[str]] = TotalVariation.sound_for
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(dict(TotalVariation.unsound_because))

    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `token_ids` is not read."""
        assert target is not None, "checked in Loss.slot_losses"
        variation = TotalVariation().per_slot(logits, token_ids, target)
        near = -torch.log1p(-variation.clamp_max(LARGEST_VARIATION))
        # In log space, so that an overlap below the smallest float32 softmax value stays accurate.
        listed = logits if target.token_ids is None else logits.gather(-1, target.token_ids)
        log_student = listed - logits.logsumexp(-1, keepdim=True)
        log_target = target.probabilities.to(logits.dtype).log()
        far = -torch.minimum(log_student, log_target).logsumexp(-1)
        return torch.where(variation < LARGEST_VARIATION, near, far)
