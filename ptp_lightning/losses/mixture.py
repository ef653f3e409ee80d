"""A weighted sum of losses: `0.1 CrossEntropy + 0.9 TotalVariation` is the default of DSpark (arXiv:2607.05147)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_lightning.losses.base import Loss
from ptp_lightning.sampling import TokenDistribution


@dataclass(frozen=True)
class WeightedLoss:
    """A term of a `MixedLoss`.

    Args:
        loss: the term.
        weight: its factor.

    Raises:
        ValueError: if the weight is not positive and finite.
    """

    loss: Loss
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"expected a positive, finite weight of each term of the loss, found {self.weight}")


@dataclass(frozen=True)
class MixedLoss(Loss):
    """A weighted sum of losses of the same slots; it is sound for the objectives for which all its terms are.

    Args:
        terms: at least one; in YAML a list of `{loss: {class_path: ..}, weight: ..}`.

    Raises:
        ValueError: if there is no term.

    >>> from ptp_lightning.losses import CrossEntropy, TotalVariation
    >>> loss = MixedLoss(terms=[WeightedLoss(CrossEntropy(), 0.1), WeightedLoss(TotalVariation(), 0.9)])
    >>> loss.needs_target, sorted(loss.sound_for)
    (True, ['categorical'])
    """

    terms: Sequence[WeightedLoss] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms:
            raise ValueError("expected at least one entry in `terms` of MixedLoss, found none")
        losses = [term.loss for term in self.terms]
        # Class constants of other losses depend on the terms here; the dataclass is frozen.
        object.__setattr__(self, "needs_target", any(loss.needs_target for loss in losses))
        object.__setattr__(self, "sound_for", frozenset.intersection(*(loss.sound_for for loss in losses)))
        reasons = {objective: why for loss in losses for objective, why in loss.unsound_because.items()}
        object.__setattr__(self, "unsound_because", reasons)

    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`."""
        return torch.stack([term.weight * term.loss.per_slot(logits, token_ids, target) for term in self.terms]).sum(0)

    def with_gradients(
        self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None, out: Tensor
    ) -> Tensor:
        """See `Loss.with_gradients`; uses the closed forms of the terms."""
        nats = torch.zeros_like(logits[:, 0])
        total, own = torch.zeros_like(logits), torch.empty_like(logits)
        for term in self.terms:
            nats += term.weight * term.loss.with_gradients(logits, token_ids, target, own)
            total.add_(own, alpha=term.weight)
        out.copy_(total)
        return nats
