"""The negative logarithm of the overlap of student and teacher, whose gradient does not fade from afar."""

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
"""Up to here the overlap is `1 - total variation`, which is exactly 1 at equality; beyond, it is added up itself."""


@dataclass(frozen=True)
class NegativeLogOverlap(Loss):
    """`-log sum_t min(P_k(t), Q_k(t))`, in nats: 0 where student P and teacher Q are equal (LK loss, arXiv:2602.23881).

    The overlap is the largest probability with which two samplers can agree. Its gradient is that of the total
    variation divided by the overlap, so it is as large for a student that is far away as for one that is close.
    """

    needs_teacher: ClassVar[bool] = True
    sound_for: ClassVar[frozenset[str]] = TotalVariation.sound_for
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(dict(TotalVariation.unsound_because))

    def per_slot(self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `token_ids` is not read."""
        assert teacher is not None, "checked in Loss.of_slots"
        variation = TotalVariation().per_slot(logits, token_ids, teacher)
        near = -torch.log1p(-variation.clamp_max(LARGEST_VARIATION))
        # Added up as logarithms, so that an overlap too small for a softmax in float32 keeps its digits.
        listed = logits if teacher.token_ids is None else logits.gather(-1, teacher.token_ids)
        log_student = listed - logits.logsumexp(-1, keepdim=True)
        log_teacher = teacher.probabilities.to(logits.dtype).log()
        far = -torch.minimum(log_student, log_teacher).logsumexp(-1)
        return torch.where(variation < LARGEST_VARIATION, near, far)
