"""How much each slot of a window weighs in the loss.

Weights are not normalised within a window. The loss divides by the sum of all weights of all ranks (`LossSum.count`),
so it stays a mean and only ratios between weights matter; the first slot of every window weighs 1.

Tensor sizes: L - 1 slots in a window; `...` any shape of windows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionWeights(ABC):
    """Weights of the slots of windows; a new kind is a subclass with `relative`."""

    needs_correct_probability: ClassVar[bool] = False
    """Whether `correct_probability` is read; measuring it costs a softmax per slot."""

    @abstractmethod
    def relative(self, correct_probability: Tensor) -> Tensor:
        """Weights `[..., L - 1]` of slots that are all valid; arguments as in `__call__`."""

    @torch.no_grad()
    def __call__(self, mask: Tensor, correct_probability: Tensor | None = None) -> Tensor:
        """Weigh slots, without gradient.

        Args:
            mask: `[..., L - 1]` bool, the slots that count: a prefix of each window.
            correct_probability: `[..., L - 1]`, the probability that a slot drafts the reference token, given that all
                slots before it do (`Objective.correct_probability`); not read where the mask is false. None unless
                `needs_correct_probability`.

        Returns:
            `[..., L - 1]` float32, 0 where the mask is false.
        """
        assert correct_probability is not None or not self.needs_correct_probability, "checked by the caller"
        probability = mask if correct_probability is None else correct_probability
        return torch.where(mask, self.relative(probability.to(torch.float32)), 0.0)


@dataclass(frozen=True)
class UniformWeights(PositionWeights):
    """All slots weigh the same."""

    def relative(self, correct_probability: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(correct_probability)


@dataclass(frozen=True)
class GeometricWeights(PositionWeights):
    """The j-th slot weighs `decay ** j`, the first one 1.

    Args:
        decay: below 1 early slots weigh more, above 1 late ones.

    Raises:
        ValueError: if the decay is not positive and finite.

    >>> GeometricWeights(decay=0.5)(torch.tensor([True, True, True, False]))
    tensor([1.0000, 0.5000, 0.2500, 0.0000])
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.decay < math.inf:
            raise ValueError(f"expected a positive, finite decay of position_weights, found {self.decay}")

    def relative(self, correct_probability: Tensor) -> Tensor:
        """`decay ** j`."""
        num_slots = correct_probability.shape[-1]
        exponents = torch.arange(num_slots, device=correct_probability.device, dtype=correct_probability.dtype)
        return (self.decay**exponents).expand_as(correct_probability)


@dataclass(frozen=True)
class AcceptedLengthWeights(PositionWeights):
    """A slot weighs the probability that all slots before it are correct: its share in the accepted length.

    Let r_j be the probability that slot j is correct given that those before it are. The expected number of correct
    slots is `sum_j w_j r_j` with `w_j = prod_{i < j} r_i`. The weights w are those of the current student, without
    gradient, because decoding never reads a slot after the first error. The effect of a slot on later ones is left
    out: the full derivative weighs `log r_j` by `sum_{i >= j} w_i r_i`.

    Windows in which the student errs early count less in total than others. Slots that carry no auxiliaries learn the
    marginal over the windows whose earlier slots are correct, which are the windows that decoding reads.

    >>> AcceptedLengthWeights()(torch.tensor([True, True, True]), torch.tensor([0.5, 0.8, 0.9]))
    tensor([1.0000, 0.5000, 0.4000])
    """

    needs_correct_probability: ClassVar[bool] = True

    def relative(self, correct_probability: Tensor) -> Tensor:
        """`prod_{i < j} r_i`."""
        first = torch.ones_like(correct_probability[..., :1])
        return torch.cat([first, correct_probability[..., :-1].cumprod(-1)], dim=-1)
