"""How slots are divided among branches, and what a call with them commits in the long run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations

import numpy as np

from ptp_lightning.decoding import CorrectLengths
from ptp_lightning.decoding.slot_allocation import allocate

SMALLEST_GAIN = 1e-4  # of tokens and rates
NUM_DOUBLINGS = 12


@cache
def best_branches(longest: int, num_slots: int, right: float) -> tuple[int, ...]:
    """The division of slots among branches that commits most tokens, as far as moving single slots finds it.

    Args:
        longest: D, most slots of a branch.
        num_slots: at most D * (D + 1), which is all that branches can hold.
        right: see `expected_tokens`.
    """
    branches = list(allocate(CorrectLengths.geometric(right, longest), longest, num_slots))
    best = expected_tokens(branches, right)
    moves = list(permutations(range(longest + 1), 2))
    improved = True
    while improved:
        improved = False
        for giver, taker in moves:
            if branches[giver] == 0 or branches[taker] == longest:
                continue
            changed = list(branches)
            changed[giver], changed[taker] = changed[giver] - 1, changed[taker] + 1
            expected = expected_tokens(changed, right)
            if expected > best + SMALLEST_GAIN:
                branches, best, improved = changed, expected, True
    return tuple(branches)


def break_even(branches: Sequence[int], steps: float) -> float | None:
    """The rate of right tokens with which a call of so many steps commits as many tokens; None if none is enough."""
    if expected_tokens(branches, 1.0) < steps:
        return None
    below, above = 0.0, 1.0
    while above - below > SMALLEST_GAIN:
        middle = (below + above) / 2
        below, above = (below, middle) if expected_tokens(branches, middle) >= steps else (middle, above)
    return above


def expected_tokens(branches: Sequence[int], right: float) -> float:
    """Tokens that a call commits in the long run, whose branches are the same however long its draft is.

    Args:
        branches: slots after 0, 1, .. D correct tokens.
        right: probability of each token of a draft, if those before it are right.
    """
    longest = len(branches) - 1
    survival = right ** np.arange(longest + 1.0)
    committed = survival.cumsum()  # by a draft of 0, 1, .. D tokens
    moves = np.zeros((longest + 1, longest + 1))  # from the length of a draft to that of the next
    for length in range(longest + 1):
        np.add.at(moves[length], list(branches[: length + 1]), -np.diff([*survival[: length + 1], 0.0]))
    shares = np.eye(longest + 1)[0]  # the first draft has no token
    for _ in range(NUM_DOUBLINGS):  # the mean over 2, 4, 8 .. calls: perfect drafts go round in circles
        shares = (shares + shares @ moves) / 2
        moves = moves @ moves
    return float(shares @ committed)
