"""Strategies for the auxiliaries of given tokens: where in its interval u is drawn (arXiv:2512.21323, eq. 9).

Any u in the interval of a token picks it. So a strategy does not decide what is learned, only how often each place of
an interval is met: a density that is positive in the whole interval leaves the optimum of a student unchanged. A new
strategy is one class with `draw`, or with `relative` if it looks at nothing.
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


class StudentAnswer(NamedTuple):
    """What the student makes of auxiliaries for given tokens, which it is compared with.

    Attributes:
        correct: `[B, N, L]` bool, it proposes the given token.
        interval: (lower, upper), each `[B, N, L]` float64: the auxiliaries for which it would, all others being equal;
            None for a student whose proposal is no Pick(u_k, P_k).
    """

    correct: Tensor
    interval: tuple[Tensor, Tensor] | None


class StudentProbe(Protocol):
    """Asks the student about given tokens; an answer costs a forward pass without gradients."""

    def __call__(self, auxiliaries: Tensor) -> StudentAnswer:
        """Its answer to auxiliaries `[B, N, L]`, float64 in [0, 1)."""
        ...


class AuxiliaryStrategy(ABC):
    """Draws auxiliaries of given tokens inside their intervals."""

    @abstractmethod
    def draw(self, lower: Tensor, upper: Tensor, generator: torch.Generator, probe: StudentProbe) -> Tensor:
        """One auxiliary a token.

        Args:
            lower: `[B, N, L]` float64, lower ends of the intervals.
            upper: their upper ends, which are outside.
            generator: of all draws; how often it is called depends on the shape alone.
            probe: is used by strategies that adapt to the student.

        Returns:
            `[B, N, L]` float64, `lower <= u < upper` after rounding too; an empty interval gives `u = lower`.
        """


class RelativeStrategy(AuxiliaryStrategy):
    """`u = lower + r (upper - lower)` with relative positions r in [0, 1] that depend on nothing."""

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
    """`r ~ Uniform[0, 1)`: what decoding meets, where all u are uniform."""

    def relative(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        """See `RelativeStrategy.relative`."""
        return draw_auxiliaries(shape, generator, device)


@dataclass(frozen=True)
class BetaInInterval(RelativeStrategy):
    """`r ~ Beta(b, b)`: more at the edges of intervals for b < 1, more in the middle for b > 1 (paper, section 2).

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
        # A pair of Dirichlet(b, b) is (r, 1 - r); what torch.distributions calls, with a generator.
        concentration = torch.full((*shape, 2), self.b, dtype=torch.float64, device=generator.device)
        pair: Tensor = torch._sample_dirichlet(concentration, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        return pair[..., 0].to(device)


@dataclass(frozen=True)
class ErrorSeekingInInterval(AuxiliaryStrategy):
    """More weight where the student errs now; an own design for what the paper leaves open.

    The student is asked once about auxiliaries u' that are uniform in the intervals. Then, with probability `strength`
    at each position,

    * a student that proposes Pick(u_k, P_k) (categorical) has an interval I_P of the given token of its own. It errs on
      what I_P leaves of the token's interval I_Q: u_k is drawn again, uniform in I_Q without I_P, if that is not empty;
    * a one-hot student does not say where it errs: u_k is drawn again, uniform in I_Q, where it was right. Where it was
      wrong, u_k stays.

    All other u' stay. So u lies inside its interval. Given the earlier u', its density is `1 - strength` times the
    uniform one or more everywhere there, and higher by one factor where the student errs: `1 + strength (1/e - 1)`
    (categorical; e is the wrong part of the interval) or `1 + strength (1 - e)` (one-hot). Where it errs nowhere, u is
    uniform.

    What this changes: a loss that compares a slot with the teacher (or with the token) for each u has the same optimum
    under every positive density. u_k depends on tokens up to t_k alone, never on later ones, so that it tells a slot no
    more about what comes than its interval does. In categorical PTP u_k conditions the slots after it, never its own
    token's: these see u_<k from the changed distribution, and what they should say about t_k, Q(. | t_<k), is
    the same for all of them. A student that cannot fit everything fits these places better and others worse. The
    student's intervals at later positions were found with u', of which some were drawn again: weights may be off
    there, correctness is not. Slots of the independent baseline know no u; only its proposals could change, and they
    are not trained.

    Args:
        strength: probability of drawing again, in [0, 1); 0 is uniform.

    Raises:
        ValueError: the strength is out of range.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength < 1:
            raise ValueError(
                f"expected strategy.init_args.strength in [0, 1), found {self.strength}: at 1, places where the "
                "student is right would never be met again"
            )

    def draw(self, lower: Tensor, upper: Tensor, generator: torch.Generator, probe: StudentProbe) -> Tensor:
        """See `AuxiliaryStrategy.draw`."""
        uniform = UniformInInterval()
        first = uniform(lower, upper, generator)
        seek, side = (draw_auxiliaries(lower.shape, generator, lower.device) for _ in range(2))
        answer = probe(first)
        again = seek < self.strength
        if answer.interval is None:
            again = again & answer.correct
        else:
            # What the student's interval leaves: [lower, left_end) and [right_start, upper), either may be empty.
            left_end = torch.minimum(upper, torch.maximum(lower, answer.interval[0]))
            right_start = torch.maximum(lower, torch.minimum(upper, answer.interval[1]))
            left, right = left_end - lower, upper - right_start
            again = again & (left + right > 0)
            is_left = (side * (left + right) < left) | (right <= 0)
            lower, upper = lower.where(is_left, right_start), left_end.where(is_left, upper)
        return uniform(lower, upper, generator).where(again, first)
