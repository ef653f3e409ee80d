"""Allocation of slots to branches, and the expected number of tokens that a call commits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations

import numpy as np

from ptp_lightning.decoding import CorrectLengths
from ptp_lightning.decoding.slot_allocation import allocate_slots

TOLERANCE = 1e-4  # of expected tokens and of acceptance rates
NUM_DOUBLINGS = 12


@cache
def best_branches(longest: int, num_slots: int, acceptance_rate: float) -> tuple[int, ...]:
    """The allocation of slots that commits most tokens, found by moving single slots between branches.

    Args:
        longest: D, maximum number of slots of a branch.
        num_slots: at most D * (D + 1), the capacity of all branches.
        acceptance_rate: see `expected_tokens`.
    """
    branches = list(allocate_slots(CorrectLengths.geometric(acceptance_rate, longest), longest, num_slots))
    best = expected_tokens(branches, acceptance_rate)
    moves = list(permutations(range(longest + 1), 2))
    improved = True
    while improved:
        improved = False
        for source, target in moves:
            if branches[source] == 0 or branches[target] == longest:
                continue
            changed = list(branches)
            changed[source], changed[target] = changed[source] - 1, changed[target] + 1
            expected = expected_tokens(changed, acceptance_rate)
            if expected > best + TOLERANCE:
                branches, best, improved = changed, expected, True
    return tuple(branches)


def break_even_acceptance_rate(branches: Sequence[int], call_cost: float) -> float | None:
    """The acceptance rate at which a call commits `call_cost` tokens; None if no rate suffices.

    Args:
        branches: see `expected_tokens`.
        call_cost: of a call, in steps of autoregressive decoding.
    """
    if expected_tokens(branches, 1.0) < call_cost:
        return None
    below, above = 0.0, 1.0
    while above - below > TOLERANCE:
        middle = (below + above) / 2
        below, above = (below, middle) if expected_tokens(branches, middle) >= call_cost else (middle, above)
    return above


def expected_tokens(branches: Sequence[int], acceptance_rate: float) -> float:
    """Mean number of tokens that a call commits, if all calls have the same branches.

    Args:
        branches: slots after 0, 1, .. D correct tokens of a draft.
        acceptance_rate: probability that a token of a draft is correct, given that those before it are.

    >>> expected_tokens((2, 2, 2), acceptance_rate=0.0)
    1.0
    """
    longest = len(branches) - 1
    survival = acceptance_rate ** np.arange(longest + 1.0)
    committed = survival.cumsum()  # by a draft of 0, 1, .. D tokens
    moves = np.zeros((longest + 1, longest + 1))  # transition matrix of the length of a draft
    for length in range(longest + 1):
        np.add.at(moves[length], list(branches[: length + 1]), -np.diff([*survival[: length + 1], 0.0]))
    distribution = np.eye(longest + 1)[0]  # the first draft is empty
    for _ in range(NUM_DOUBLINGS):  # mean over 2, 4, 8, .. calls, because the lengths of correct drafts are periodic
        distribution = (distribution + distribution @ moves) / 2
        moves = moves @ moves
    return float(distribution @ committed)
