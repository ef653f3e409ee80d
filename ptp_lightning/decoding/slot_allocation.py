"""Slots for partial quadratic decoding: how many go on after each possible number of correct tokens.

A call verifies a draft of m tokens and looks ahead after each number k = 0 .. m of correct ones, since it cannot know
which it will be. With B_k slots after k correct tokens the next draft has B_k tokens; min(B_k, C) of them are right, C
being how many a draft without end would have right. So a call's slots are worth `sum_k Pr[k correct] E[min(B_k, C)]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFAULT_RATE = 0.6  # of right tokens, where no validation has told
NUM_CYCLES = 200  # until the lengths of drafts have settled; a draft hardly depends on one so many calls ago


@dataclass(frozen=True)
class CorrectLengths:
    """How many tokens of a draft are right, its exact first token not counted.

    Args:
        survival: `Pr[C >= 1], Pr[C >= 2], ..`; longer drafts have no more right than the last entry says.

    Raises:
        ValueError: it is no such sequence: empty, outside 0 .. 1, or rising.
    """

    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = np.diff([1.0, *self.survival, 0.0])
        if not self.survival or not (steps <= 0).all():
            raise ValueError(
                f"expected probabilities that never rise, between 1 and 0, found {list(self.survival)}: set survival"
            )

    @classmethod
    def from_counts(cls, counts: Sequence[float]) -> CorrectLengths:
        """Of windows in which 0, 1, 2 .. slots were right.

        Raises:
            ValueError: there are none, or not at least two entries.
        """
        total = np.asarray(counts, dtype=float)
        if total.size < 2 or not (total >= 0).all() or not total.sum() > 0:
            raise ValueError(f"expected counts of windows by their number of right slots, found {list(counts)}")
        at_least = total[::-1].cumsum()[::-1]
        return cls(tuple(float(share) for share in at_least[1:] / at_least[0]))

    @classmethod
    def of_validation(cls, prefix_counts: Sequence[float] | None, longest: int) -> CorrectLengths:
        """What a predictor's `prefix_counts` say of its drafts of up to `longest` tokens; a guess where there are none.

        Drafts longer than in validation are taken to go on as those ended: with the same share of right tokens.
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
        """Each token is right with the same probability if those before it are."""
        return cls(tuple(rate**length for length in range(1, longest + 1)))

    def up_to(self, longest: int) -> CorrectLengths:
        """For drafts of at most this many tokens."""
        return CorrectLengths(self.survival[:longest])

    def of_draft(self, length: int) -> np.ndarray:
        """`[length + 1]`: probabilities that 0 .. length tokens of a draft are right."""
        return -np.diff([1.0, *self._padded(length), 0.0])

    def expected(self, length: int) -> float:
        """`E[min(length, C)]`."""
        return float(sum(self._padded(length)))

    def _padded(self, length: int) -> list[float]:
        return [*self.survival[:length], *[0.0] * (length - len(self.survival))]


@lru_cache(maxsize=4096)
def allocate(lengths: CorrectLengths, draft_length: int, budget: int) -> tuple[int, ...]:
    """The best division of `budget` slots among the `draft_length + 1` branches, exactly.

    One slot more in branch k is worth `Pr[k correct] * Pr[C > B_k]`. As this falls with B_k, the `budget` most valuable
    single slots are, in each branch, its first ones: taking them is the optimum, not an approximation.

    Args:
        lengths: of drafts.
        draft_length: m, tokens that the call verifies.
        budget: slots of the call.

    Returns:
        B_0 .. B_m; their sum is the budget, or less if more slots are worth nothing.
    """
    survival = np.asarray(lengths.survival)
    worth = np.outer(lengths.of_draft(draft_length), survival)
    taken = np.argsort(-worth, axis=None, kind="stable")[:budget]
    taken = taken[worth.flat[taken] > 0]
    return tuple(int(slots) for slots in np.bincount(taken // survival.size, minlength=draft_length + 1))


def length_shares(lengths: CorrectLengths, budget: int) -> np.ndarray:
    """How often calls have a draft of 0, 1, 2 .. tokens to verify, in the long run.

    The draft that a call verifies is as long as the branch that the call before it ended in, so the length of drafts is
    a Markov chain, and this its stationary distribution.
    """
    longest = len(lengths.survival)
    moves = np.zeros((longest + 1, longest + 1))
    for length in range(longest + 1):
        slots = allocate(lengths, length, budget)
        np.add.at(moves[length], list(slots), lengths.of_draft(length))
    shares = np.zeros(longest + 1)
    shares[0] = 1.0
    for _ in range(NUM_CYCLES):
        shares = shares @ moves
    return shares


def expected_tokens(lengths: CorrectLengths, budget: int) -> float:
    """Tokens that a call commits in the long run, the base model's own pick included."""
    shares = length_shares(lengths, budget)
    return 1.0 + float(shares @ [lengths.expected(length) for length in range(len(shares))])
