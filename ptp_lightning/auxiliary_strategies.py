"""Strategies for the auxiliaries of given tokens: where in its interval u is drawn (arXiv:2512.21323, eq. 9).

Every u in the interval of a token picks it. A strategy therefore does not change what is learned, only how often each
part of an interval occurs: a density that is positive in the whole interval leaves the optimum of a student unchanged.
A new strategy is one class with `draw`, or with `relative` if the position in the interval depends on nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries

SMALLEST_BETA = 0.01  # below, gamma variables underflow float64 and their ratio is no longer Beta


class ProbeResult(NamedTuple):
    """Where the student's draft agrees with given tokens.

    Attributes:
        correct: `[B, N, L]` bool, the student drafts the given token.
        interval: (lower, upper), each `[B, N, L]` float64: the auxiliaries u_k for which it drafts the given token, all
            other auxiliaries being equal; None for a student that does not draft Pick(u_k, P_k).
    """

    correct: Tensor
    interval: tuple[Tensor, Tensor] | None


class StudentProbe(Protocol):
    """Compares the student's draft with given tokens; each call costs a forward pass without gradients."""

    def __call__(self, auxiliaries: Tensor) -> ProbeResult:
        """The agreement for auxiliaries `[B, N, L]`, float64 in [0, 1)."""
        ...


class AuxiliaryStrategy(ABC):
    """Draws auxiliaries of given tokens inside their intervals."""

    @abstractmethod
    def draw(self, lower: Tensor, upper: Tensor, generator: torch.Generator, probe: StudentProbe) -> Tensor:
        """One auxiliary for each token.

        Args:
            lower: `[B, N, L]` float64, lower ends of the intervals (inclusive).
            upper: `[B, N, L]` float64, upper ends (exclusive).
            generator: of all draws; the number of draws depends on the shape alone.
            probe: used by strategies that adapt to the student.

        Returns:
            `[B, N, L]` float64, `lower <= u < upper` after rounding too; an empty interval gives `u = lower`.
        """


class RelativeStrategy(AuxiliaryStrategy):
    """`u = lower + r (upper - lower)` with relative positions r in [0, 1] that are drawn independently of all else."""

    @abstractmethod
    def relative(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        """Relative positions r of shape `shape`, float64."""

    def __call__(self, lower: Tensor, upper: Tensor, generator: torch.Generator) -> Tensor:
        """Auxiliaries `[...]` in intervals of any shape, as in `AuxiliaryStrategy.draw`, without a student."""
        r = self.relative(lower.shape, generator, lower.device)
        return torch.minimum(lower + r * (upper - lower), torch.nextafter(upper, lower))

    def draw(self, lower: Tensor, upper: Tensor, generator: torch.Generator, probe: StudentProbe) -> Tensor:
        """See `AuxiliaryStrategy.draw`."""
        return self(lower, upper, generator)


@dataclass(frozen=True)
class UniformInInterval(RelativeStrategy):
    """`r ~ Uniform[0, 1)`: the distribution of decoding, where all u are uniform.

    >>> lower, upper = torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0])
    >>> u = UniformInInterval()(lower, upper, torch.Generator().manual_seed(0))
    >>> bool(((lower <= u) & (u < upper)).all())
    True
    """

    def relative(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        """See `RelativeStrategy.relative`."""
        return draw_auxiliaries(shape, generator, device)


@dataclass(frozen=True)
class BetaInInterval(RelativeStrategy):
    """`r ~ Beta(b, b)`: near the edges of intervals for b < 1, near their centres for b > 1 (paper, section 2).

    Args:
        b: both shape parameters; 1 is uniform.

    Raises:
        ValueError: b is out of range.
    """

    b: float = 1.0

    def __post_init__(self) -> None:
        if not SMALLEST_BETA <= self.b < math.inf:
            raise ValueError(f"expected strategy.init_args.b finite and >= {SMALLEST_BETA}, found {self.b}")

    def relative(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        """See `RelativeStrategy.relative`."""
        # A sample of Dirichlet(b, b) is (r, 1 - r). torch.distributions calls this function without a generator.
        concentration = torch.full((*shape, 2), self.b, dtype=torch.float64, device=generator.device)
        pair: Tensor = torch._sample_dirichlet(concentration, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        return pair[..., 0].to(device)


@dataclass(frozen=True)
class ErrorSeekingInInterval(AuxiliaryStrategy):
    """More weight where the current student errs; our own design, the paper leaves this open.

    The student is probed once with auxiliaries u' that are uniform in the intervals. Then, with probability `strength`
    at each position:

    * A categorical student drafts Pick(u_k, P_k) and has its own interval I_P of the given token. It errs on the part
      of the token's interval I_Q outside I_P: u_k is redrawn uniformly from that part, if it is not empty.
    * A one-hot student does not show where it errs: u_k is redrawn uniformly from I_Q if the draft was correct. If it
      was wrong, u_k is unchanged.

    All other u' are unchanged, so every u lies inside its interval. Given the earlier u', its density is at least
    `1 - strength` times the uniform density everywhere in the interval, and larger by one factor where the student
    errs: `1 + strength (1/e - 1)` (categorical; e is the wrong fraction of the interval) or `1 + strength (1 - e)`
    (one-hot). If the student does not err, u is uniform.

    Consequences: a loss that compares a slot with the teacher (or with the token) for each u has the same optimum under
    every positive density. u_k depends on tokens up to t_k alone, so it reveals no more about later tokens than its
    interval does. In categorical PTP u_k conditions the slots after it, never the slot that predicts t_k. That slot is
    conditioned on u_<k from the changed distribution, but its target Q(. | t_<k) does not depend on them within their
    intervals. A student of limited capacity fits the redrawn regions better and others worse. The student's intervals
    at later positions were computed with u', some of which are redrawn: the weights there are approximate, correctness
    is not affected. Slots of the independent baseline carry no u, so its training does not change.

    Args:
        strength: probability of redrawing, in [0, 1); 0 is uniform.

    Raises:
        ValueError: the strength is out of range.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength < 1:
            raise ValueError(
                f"expected strategy.init_args.strength in [0, 1), found {self.strength}: at 1, u would never "
                "be drawn where the student is correct"
            )

    def draw(self, lower: Tensor, upper: Tensor, generator: torch.Generator, probe: StudentProbe) -> Tensor:
        """See `AuxiliaryStrategy.draw`."""
        uniform = UniformInInterval()
        first = uniform(lower, upper, generator)
        redraw_draw, side_draw = (draw_auxiliaries(lower.shape, generator, lower.device) for _ in range(2))
        result = probe(first)
        redraws = redraw_draw < self.strength
        if result.interval is None:
            redraws = redraws & result.correct
        else:
            # The interval without the student's: [lower, left_end) and [right_start, upper); either may be empty.
            left_end = torch.minimum(upper, torch.maximum(lower, result.interval[0]))
            right_start = torch.maximum(lower, torch.minimum(upper, result.interval[1]))
            left, right = left_end - lower, upper - right_start
            redraws = redraws & (left + right > 0)
            is_left = (side_draw * (left + right) < left) | (right <= 0)
            lower, upper = lower.where(is_left, right_start), left_end.where(is_left, upper)
        return uniform(lower, upper, generator).where(redraws, first)
