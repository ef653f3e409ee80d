"""How much each slot of a window weighs in the loss.

Weights are not normalised within a window. The loss divides by the sum of all weights of all ranks (`LossSum.count`),
so it stays a mean, the first slot of every window weighs 1, and only ratios between weights matter.

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
    """Whether the probabilities of being right are read; measuring them costs a softmax per slot."""

    @abstractmethod
    def relative(self, right: Tensor) -> Tensor:
        """Weights `[..., L - 1]` of slots that are all valid; arguments as in `__call__`."""

    @torch.no_grad()
    def __call__(self, mask: Tensor, right: Tensor | None = None) -> Tensor:
        """Weigh slots, without gradient.

        Args:
            mask: `[..., L - 1]` bool, the slots that count: a prefix of each window.
            right: `[..., L - 1]`, the probability that a slot's proposal is the reference token if those before it
                are (`Objective.correct_probability`); anything where the mask is false. None unless
                `needs_correct_probability`.

        Returns:
            `[..., L - 1]` float32, 0 where the mask is false.
        """
        assert right is not None or not self.needs_correct_probability, "checked by the caller"
        ones = mask.to(torch.float32)
        return torch.where(mask, self.relative(ones if right is None else right.to(torch.float32)), 0.0)


@dataclass(frozen=True)
class UniformWeights(PositionWeights):
    """All slots weigh the same."""

    def relative(self, right: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(right)


@dataclass(frozen=True)
class GeometricWeights(PositionWeights):
    """The j-th slot weighs `decay ** j`, the first one 1.

    Args:
        decay: below 1 early slots weigh more, above 1 late ones.

    Raises:
        ValueError: if the decay is not positive and finite.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.decay < math.inf:
            raise ValueError(f"expected a positive, finite decay of position_weights, found {self.decay}")

    def relative(self, right: Tensor) -> Tensor:
        """`decay ** j`."""
        exponents = torch.arange(right.shape[-1], device=right.device, dtype=right.dtype)
        return (self.decay**exponents).expand_as(right)


@dataclass(frozen=True)
class AcceptedLengthWeights(PositionWeights):
    """A slot weighs what it can add to the accepted length: the probability that all slots before it are right.

    With r_j the probability that slot j is right if those before it are, the expected number of right slots is
    `sum_j w_j r_j`, `w_j = prod_{i < j} r_i`. The weights w are what the student has reached so far, without gradient;
    a slot behind one that fails is never looked at when decoding. What a slot does for the ones after it is left out:
    the full derivative weighs `log r_j` by `sum_{i >= j} w_i r_i`.

    Windows in which the student errs early count less in total than others. Slots that carry no auxiliaries learn the
    marginal over the windows in which the slots before them are right, which are the ones that matter.
    """

    needs_correct_probability: ClassVar[bool] = True

    def relative(self, right: Tensor) -> Tensor:
        """`prod_{i < j} r_i`."""
        return torch.cat([torch.ones_like(right[..., :1]), right[..., :-1].cumprod(-1)], dim=-1)
