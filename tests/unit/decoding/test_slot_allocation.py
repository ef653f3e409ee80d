"""The division of slots is the best there is, by trying all of them; and what a budget is worth in the long run."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.decoding.slot_allocation import (
    CorrectLengths,
    allocate_slots,
    draft_length_distribution,
    expected_tokens,
)


def worth(lengths: CorrectLengths, draft_length: int, slots: tuple[int, ...]) -> float:
    """Of a division, from its definition: drafts accepted after each number of correct tokens."""
    chance = lengths.probabilities(draft_length)
    counts = -np.diff([1.0, *lengths.survival, 0.0])  # Pr[C = 0], Pr[C = 1] ..
    return sum(
        float(chance[k] * counts[c] * min(slots[k], c)) for k in range(draft_length + 1) for c in range(len(counts))
    )


survivals = st.lists(st.floats(0, 1), min_size=1, max_size=5).map(lambda drawn: tuple(sorted(drawn, reverse=True)))


class TestAllocate:
    @given(survivals, st.integers(0, 3), st.integers(1, 7))
    def test_no_division_is_better(self, survival: tuple[float, ...], draft_length: int, budget: int) -> None:
        lengths = CorrectLengths(survival)
        draft_length = min(draft_length, len(survival))
        found = allocate_slots(lengths, draft_length, budget)
        divisions = itertools.product(range(budget + 1), repeat=draft_length + 1)
        best = max(worth(lengths, draft_length, slots) for slots in divisions if sum(slots) <= budget)
        assert len(found) == draft_length + 1 and sum(found) <= budget
        assert worth(lengths, draft_length, found) == pytest.approx(best, abs=1e-12)

    def test_likely_branches_go_further(self) -> None:
        # After 0, 1, 2 correct tokens: chances 1/4, 1/4, 1/2. One slot more is worth, branch by branch,
        # 3/16 2/16, 3/16 2/16, 6/16 4/16: the five best are 6, 4, 3, 3 and the first of the 2s.
        assert allocate_slots(CorrectLengths((0.75, 0.5)), 2, 5) == (2, 1, 2)

    def test_no_slot_is_spent_on_what_never_happens(self) -> None:
        assert allocate_slots(CorrectLengths((1.0, 1.0, 0.0)), 2, 100) == (0, 0, 2)

    def test_twenty_branches_and_two_hundred_slots_take_less_than_a_millisecond(self) -> None:
        lengths = CorrectLengths.geometric(0.9, 200)
        allocate_slots.cache_clear()
        seconds = []
        for budget in range(195, 205):
            begin = time.thread_time()
            allocate_slots(lengths, 20, budget)
            seconds.append(time.thread_time() - begin)
        assert min(seconds) < 1e-3


class TestCorrectLengths:
    def test_of_counts(self) -> None:
        lengths = CorrectLengths.from_counts([5, 3, 0, 2])  # windows with 0, 1, 2, 3 correct slots
        assert lengths.survival == (0.5, 0.2, 0.2)
        assert lengths.probabilities(2).tolist() == pytest.approx([0.5, 0.3, 0.2])
        assert lengths.expected(2) == pytest.approx(0.7)
        assert lengths.expected(9) == pytest.approx(0.9)

    @pytest.mark.parametrize("survival", [(), (0.5, 0.6), (1.2,), (0.5, -0.1), (float("nan"),)])
    def test_no_probabilities_are_refused(self, survival: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match="never rise"):
            CorrectLengths(survival)

    @pytest.mark.parametrize("counts", [[], [3], [0, 0], [1, -1]])
    def test_no_counts_are_refused(self, counts: list[float]) -> None:
        with pytest.raises(ValueError, match="counts of windows"):
            CorrectLengths.from_counts(counts)


class TestExpectedTokens:
    def test_a_draft_of_one_token(self) -> None:
        # One slot. After a correct draft (1/2) or a wrong one it is worth the same; ties go to the first branch, so
        # there is a draft after a wrong one or none, and none after a correct one: a draft in 2/3 of all calls.
        assert draft_length_distribution(CorrectLengths((0.5,)), 1).tolist() == pytest.approx([1 / 3, 2 / 3])
        assert expected_tokens(CorrectLengths((0.5,)), 1) == pytest.approx(1 + 2 / 3 * 1 / 2)

    def test_all_branches_full(self) -> None:
        assert expected_tokens(CorrectLengths((0.5, 0.25)), 6) == pytest.approx(1.75)

    @given(survivals)
    def test_more_slots_are_worth_more(self, survival: tuple[float, ...]) -> None:
        lengths = CorrectLengths(survival)
        full = len(survival) * (len(survival) + 1)
        assert 1 <= expected_tokens(lengths, 1) <= expected_tokens(lengths, full) + 1e-9
        assert expected_tokens(lengths, full) == pytest.approx(1 + lengths.expected(len(survival)))


class TestOfValidation:
    def test_the_exact_first_token_does_not_count(self) -> None:
        counts = [0, 4, 2, 1, 1]  # windows with 0, 1, 2, 3, 4 correct tokens
        assert CorrectLengths.from_validation(counts, 3).survival == (0.5, 0.25, 0.125)
        assert CorrectLengths.from_validation(counts, 2).survival == (0.5, 0.25)

    def test_longer_drafts_go_on_as_those_of_validation_end(self) -> None:
        assert CorrectLengths.from_validation([0, 5, 4, 1], 4).survival == pytest.approx((0.5, 0.1, 0.02, 0.004))

    def test_without_validation_it_is_a_guess(self) -> None:
        assert CorrectLengths.from_validation(None, 2) == CorrectLengths.geometric(0.6, 2)
