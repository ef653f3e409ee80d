"""How partial quadratic decoding divides its slots among branches, one after each possible number of correct tokens.

A call verifies a draft of m tokens and looks ahead after each number k = 0 .. m of correct tokens, since it cannot know
which it will be. With B_k slots after k correct tokens the next draft has B_k tokens. If C is the number of correct
tokens of a draft without end, min(B_k, C) of them are correct. So a call's slots are worth
`sum_k Pr[k correct] E[min(B_k, C)]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFAULT_RATE = 0.6  # of correct tokens, for a predictor without validation
NUM_CYCLES = 200  # until the distribution of draft lengths is stationary; its memory is a few calls


@dataclass(frozen=True)
class CorrectLengths:
    """Distribution of C, the number of correct tokens of a draft, without its exact first token.

    Args:
        survival: `Pr[C >= 1], Pr[C >= 2], ..`; C is at most its length.

    Raises:
        ValueError: this is not a survival function: it is empty, outside 0 .. 1, or rises.

    >>> lengths = CorrectLengths((0.75, 0.5))
    >>> lengths.probabilities(2).tolist()  # of 0, 1 and 2 correct tokens
    [0.25, 0.25, 0.5]
    >>> lengths.expected(2)
    1.25
    """

    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = np.diff([1.0, *self.survival, 0.0])
        if not self.survival or not (steps <= 0).all():
            raise ValueError(
                f"expected probabilities between 0 and 1 that never rise, found {list(self.survival)}: set survival"
            )

    @classmethod
    def from_counts(cls, counts: Sequence[float]) -> CorrectLengths:
        """The distribution in a sample of drafts, given how many had 0, 1, 2, .. correct tokens.

        Raises:
            ValueError: all counts are zero, one is negative, or there are fewer than two.
        """
        total = np.asarray(counts, dtype=float)
        if total.size < 2 or not (total >= 0).all() or not total.sum() > 0:
            raise ValueError(f"expected counts of windows with 0, 1, .. correct slots, found {list(counts)}")
        at_least = total[::-1].cumsum()[::-1]
        return cls(tuple(float(share) for share in at_least[1:] / at_least[0]))

    @classmethod
    def from_validation(cls, prefix_counts: Sequence[float] | None, longest: int) -> CorrectLengths:
        """The distribution in a predictor's validation, for drafts of up to `longest` tokens.

        Drafts longer than those of validation are extrapolated with the conditional probability of their last token.

        Args:
            prefix_counts: of the predictor; None for a geometric distribution with `DEFAULT_RATE`.
            longest: tokens of a draft.
        """
        if prefix_counts is None:
            return cls.geometric(DEFAULT_RATE, longest)
        survival = list(cls.from_counts(prefix_counts[1:]).survival)  # the first token is exact
        last = survival[-1] / survival[-2] if len(survival) > 1 and survival[-2] > 0 else survival[-1]
        while len(survival) < longest:
            survival.append(survival[-1] * last)
        return cls(tuple(survival[:longest]))

    @classmethod
    def geometric(cls, rate: float, longest: int) -> CorrectLengths:
        """Each token is correct with the same probability, given that all tokens before it are."""
        return cls(tuple(rate**length for length in range(1, longest + 1)))

    def truncated(self, longest: int) -> CorrectLengths:
        """For drafts of at most this many tokens."""
        return CorrectLengths(self.survival[:longest])

    def probabilities(self, length: int) -> np.ndarray:
        """`[length + 1]`: probabilities that 0 .. length tokens of a draft of this length are correct."""
        return -np.diff([1.0, *self._padded(length), 0.0])

    def expected(self, length: int) -> float:
        """`E[min(length, C)]`, the expected number of correct tokens of a draft of this length."""
        return float(sum(self._padded(length)))

    def _padded(self, length: int) -> list[float]:
        return [*self.survival[:length], *[0.0] * (length - len(self.survival))]


@lru_cache(maxsize=4096)
def allocate_slots(lengths: CorrectLengths, draft_length: int, budget: int) -> tuple[int, ...]:
    """The best division of `budget` slots among the `draft_length + 1` branches.

    One more slot in branch k is worth `Pr[k correct] * Pr[C > B_k]`. This falls with B_k, so the most valuable slots of
    a branch are its first ones, and taking the `budget` most valuable slots of all branches is the exact optimum.

    Args:
        lengths: distribution of correct tokens.
        draft_length: m, tokens that the call verifies.
        budget: slots of the call.

    Returns:
        B_0 .. B_m. Their sum is the budget, or less if more slots are worth nothing.

    >>> allocate_slots(CorrectLengths((0.75, 0.5)), draft_length=2, budget=5)
    (2, 1, 2)
    """
    survival = np.asarray(lengths.survival)
    worth = np.outer(lengths.probabilities(draft_length), survival)
    taken = np.argsort(-worth, axis=None, kind="stable")[:budget]
    taken = taken[worth.flat[taken] > 0]
    return tuple(int(slots) for slots in np.bincount(taken // survival.size, minlength=draft_length + 1))


def draft_length_distribution(lengths: CorrectLengths, budget: int) -> np.ndarray:
    """Long-run shares of the calls that verify a draft of 0, 1, 2, .. tokens.

    The draft that a call verifies is as long as the branch that the call before it continued. So the length of drafts
    is a Markov chain, and this is its stationary distribution.
    """
    longest = len(lengths.survival)
    transitions = np.zeros((longest + 1, longest + 1))
    for length in range(longest + 1):
        slots = allocate_slots(lengths, length, budget)
        np.add.at(transitions[length], list(slots), lengths.probabilities(length))
    shares = np.zeros(longest + 1)
    shares[0] = 1.0
    for _ in range(NUM_CYCLES):
        shares = shares @ transitions
    return shares


def expected_tokens(lengths: CorrectLengths, budget: int) -> float:
    """Expected number of tokens that a call commits in the long run, including the base model's own pick.

    >>> round(expected_tokens(CorrectLengths((0.75, 0.5)), budget=5), 2)
    2.15
    """
    shares = draft_length_distribution(lengths, budget)
    return 1.0 + float(shares @ [lengths.expected(length) for length in range(len(shares))])
