"""Drafts that need no network: what they contain, what is expected of them, and when the student drafts instead."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.decoding.cycle_choice import (
    EXPECTED_GAIN,
    EXPECTED_SPEED,
    STUDENT_COST,
    STUDENT_COST_IN_CACHE,
    CycleChoice,
    JoiningStudent,
    LoneStudent,
    StudentEstimate,
    cost_of_student,
)
from ptp_lightning.decoding.text_drafts import (
    BRANCH_COST,
    COPY_RATES,
    MAX_TOKENS,
    STUDENT_RATE,
    TOKEN_COST,
    TextDraft,
    TextDrafter,
    joined_tree,
)
from ptp_lightning.decoding.text_lookup import MAX_MATCH
from ptp_lightning.ngrams import Continuations, count_ngrams
from tests.helpers.tiny_predictors import tiny_predictor

NONE: Continuations = {}


def test_a_copy_is_a_chain_that_goes_on_while_it_is_likely() -> None:
    """After a match of one token it goes on with .2, after two with .4, then .5: three tokens, the last with .04."""
    draft = TextDrafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], NONE).draft(max_depth=20)
    assert (draft.token_ids, draft.parents, draft.depth) == ([2, 3, 4], [-1, 0, 1], 3)
    assert draft.expected_tokens == pytest.approx(1 + 0.2 * (1 + 0.4 * (1 + 0.5)))
    assert draft.cost == pytest.approx(1 + 2 * TOKEN_COST)
    assert TextDrafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], NONE).draft(max_depth=2).token_ids == [2, 3]


def test_ngrams_of_two_tokens_come_before_those_of_one() -> None:
    continuations = {(2,): [(3, 0.9)], (1, 2): [(4, 0.6), (5, 0.3)], (4,): [(6, 0.5)]}
    draft = TextDrafter([1, 2], continuations).draft(max_depth=5)
    assert list(zip(draft.token_ids, draft.parents, strict=True)) == [(4, -1), (5, -1), (6, 0)]
    assert draft.expected_tokens == pytest.approx(1 + 0.7 * (0.6 + 0.3) + 0.7 * 0.6 * 0.7 * 0.5)
    assert draft.cost == pytest.approx(1 + 2 * TOKEN_COST + BRANCH_COST)
    assert TextDrafter([9, 2], continuations).draft(max_depth=1).token_ids == [3]
    assert TextDrafter([9, 7], continuations).draft(max_depth=5) == TextDraft([], [], 0, 1.0, 1.0)


def test_ngrams_share_what_copies_leave() -> None:
    """Token 2 is expected by both, token 5 by n-grams alone."""
    draft = TextDrafter([1, 2, 1], {(1,): [(2, 0.5), (5, 0.5)]}).draft(max_depth=1)
    assert draft.token_ids == [2, 5]
    assert draft.expected_tokens == pytest.approx(1 + 0.2 + 0.8 * 0.7)


def test_a_chain_has_the_likeliest_token_of_each_place() -> None:
    continuations = {(2,): [(4, 0.6), (5, 0.3)], (4,): [(6, 0.5), (7, 0.4)]}
    draft = TextDrafter([2], continuations, branches=False).draft(max_depth=5)
    assert (draft.token_ids, draft.parents) == ([4, 6], [-1, 0])


def test_the_first_token_is_drafted_however_unlikely_it_is() -> None:
    draft = TextDrafter([2], {(2,): [(4, 0.02), (5, 0.01)]}).draft(max_depth=5)
    assert (draft.token_ids, draft.cost) == ([4], 1.0)


@given(
    text=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    training=st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=6),
    num_prompt=st.integers(1, 40),
    max_depth=st.integers(0, 6),
    branches=st.booleans(),
)
def test_drafts_are_trees(
    text: list[int], training: list[list[int]], num_prompt: int, max_depth: int, branches: bool
) -> None:
    drafter = TextDrafter(text[:num_prompt], count_ngrams(training, 20).continuations(), branches)
    drafter.extend(text[num_prompt:])
    draft = drafter.draft(max_depth)
    assert len(draft.token_ids) == len(draft.parents) <= MAX_TOKENS
    depths: list[int] = []
    for column, parent in enumerate(draft.parents):
        assert -1 <= parent < column
        depths.append(1 if parent < 0 else depths[parent] + 1)
    assert max(depths, default=0) == draft.depth <= max_depth
    paths = list(zip(draft.parents, draft.token_ids, strict=True))
    assert len(set(paths)) == len(paths)  # no token is read twice
    assert 1 <= draft.expected_tokens <= 1 + max_depth + 1e-9
    if not branches:
        assert draft.parents == list(range(-1, len(paths) - 1))


def test_the_expected_number_is_that_of_a_known_source() -> None:
    """Texts are drawn from the continuations themselves, so all rates can be learned."""
    source = {0: {0: 0.1, 1: 0.6, 2: 0.3}, 1: {2: 0.8, 3: 0.2}, 2: {0: 0.5, 3: 0.5}, 3: {0: 0.9, 1: 0.1}}
    continuations = {(token,): list(after.items()) for token, after in source.items()}
    generator, expected, found = random.Random(0), list[float](), list[int]()
    for _ in range(40):
        text = [0]
        drafter = TextDrafter(text, continuations)
        for step in range(120):
            after = source[text[-1]]
            text.append(generator.choices(list(after), list(after.values()))[0])
            drafter.extend(text[1:])
            draft = drafter.draft(max_depth=1)
            after = source[text[-1]]
            if step > 60:
                expected.append(draft.expected_tokens)
                found.append(1 + (generator.choices(list(after), list(after.values()))[0] in draft.token_ids))
    # 2,360 cycles have a standard error of about .007; what is learned of a text lags behind.
    assert mean(expected) == pytest.approx(mean(found), abs=0.05)
    assert mean(found) > 1.8


def test_poor_copies_end() -> None:
    """Those after a match of one token, while a match of two has a rate of its own."""
    drafter, new, expected = TextDrafter([2, 3, 4], NONE), list[int](), list[float]()
    for number in range(40):  # 3 is followed by another token each time
        new.append(3)
        drafter.extend(new)
        expected.append(drafter.draft(max_depth=1).expected_tokens)
        new.append(10 + number)
    assert expected[0] == 1 + COPY_RATES[0] and expected[-1] < 1.01
    drafter.extend([*new, 2, 3])
    assert drafter.draft(max_depth=1).expected_tokens == 1 + COPY_RATES[1]


def test_each_length_of_a_match_has_a_rate() -> None:
    assert len(COPY_RATES) == MAX_MATCH


def test_ngrams_that_are_never_right_end() -> None:
    drafter, new = TextDrafter([0], {(1,): [(2, 0.9)]}), list[int]()
    for number in range(40):
        new += [1, 10 + number]
    drafter.extend([*new, 1])
    assert drafter.draft(max_depth=1).expected_tokens < 1.1


def test_what_was_always_wrong_may_be_right_at_last() -> None:
    """After 9,000 misses; 0.9 to that power is zero, and neither source explains the last token."""
    drafter, new = TextDrafter([0], {(1,): [(2, 0.9)]}), list[int]()
    for number in range(9000):
        new += [1, 10 + number]
    new += [1, new[-1], 5, 1]
    drafter.extend(new)
    assert 1.1 < drafter.draft(max_depth=1).expected_tokens < 1.2


def test_rates_are_at_most_one() -> None:
    """Unlikely continuations that are always right say little about likely ones."""
    drafter = TextDrafter([10], {(token,): [(token + 1, 0.1)] for token in range(10, 60)} | {(3,): [(4, 0.9)]})
    drafter.extend([*range(11, 61), 3])
    assert drafter.draft(max_depth=1).expected_tokens == pytest.approx(1.9)


class TestJoinedTree:
    def test_chains_of_different_lengths(self) -> None:
        drafts = [TextDraft([4, 5], [-1, 0], 2, 1, 2), TextDraft([], [], 0, 1, 1)]
        tree = joined_tree(torch.tensor([[7], [8]]), drafts)
        assert tree.is_chain and tree.token_ids.tolist() == [[7, 4, 5], [8, 0, 0]]

    def test_a_chain_beside_a_tree(self) -> None:
        drafts = [TextDraft([4, 5, 6], [-1, -1, 1], 2, 1, 2), TextDraft([3, 2], [-1, 0], 2, 1, 2)]
        tree = joined_tree(torch.tensor([[7], [8]]), drafts)
        assert not tree.is_chain
        assert tree.token_ids.tolist() == [[7, 4, 5, 6], [8, 3, 2, 0]]
        assert tree.parents.tolist() == [[0, 0, 0, 2], [0, 0, 1, 0]]
        assert tree.depths.tolist() == [[0, 1, 1, 2], [0, 1, 2, 1]]

    def test_no_draft(self) -> None:
        tree = joined_tree(torch.tensor([[7]]), [TextDraft([], [], 0, 1, 1)])
        assert tree.is_chain and tree.token_ids.tolist() == [[7]]


def test_nothing_is_drafted_after_the_end_of_a_text() -> None:
    drafter = TextDrafter([1, 2, 3, 4, 1], NONE, end_of_text=[3])
    assert drafter.draft(max_depth=3).token_ids == [2, 3]


class TestStudent:
    def test_what_a_student_expects_is_one_source_of_several(self) -> None:
        drafter = TextDrafter([1, 2, 1], NONE)  # 2 is copied, and 1 after it
        draft = drafter.draft(2, {(): [(7, 0.9), (2, 0.1)], (7,): [(8, 1.0)]})
        assert draft.token_ids == [7, 8, 2, 1] and draft.parents == [-1, 0, -1, 2]
        of_seven = (1 - COPY_RATES[0]) * STUDENT_RATE * 0.9
        of_two = COPY_RATES[0] + (1 - COPY_RATES[0]) * STUDENT_RATE * 0.1
        expected = [of_seven, of_seven * STUDENT_RATE, of_two, of_two * COPY_RATES[1]]
        assert draft.expected_tokens == pytest.approx(1 + sum(expected))

    def test_a_token_of_several_sources_is_drafted_once(self) -> None:
        draft = TextDrafter([1, 2, 1], NONE).draft(1, {(): [(2, 0.5), (3, 0.001)]})
        assert draft.token_ids == [2]

    def test_after_other_paths_it_is_not_asked(self) -> None:
        assert TextDrafter([1, 2, 1], NONE).draft(2, {(9,): [(3, 1.0)]}).token_ids == [2, 1]

    def test_no_branches(self) -> None:
        drafter = TextDrafter([1, 2, 1], NONE, branches=False)
        assert drafter.draft(2, {(): [(7, 0.9), (6, 0.1)], (7,): [(8, 1.0)]}).token_ids == [7, 8]


KINDS = [LoneStudent, JoiningStudent]


class TestCycleChoice:
    @staticmethod
    def choice(*prompts: list[int], student: Callable[[], StudentEstimate] | None = None) -> CycleChoice:
        return CycleChoice(prompts, NONE, student)

    @staticmethod
    def token_ids(draft: TextDraft | None) -> list[int] | None:
        return None if draft is None else draft.token_ids

    def test_texts_are_apart(self) -> None:
        choice = self.choice([1, 2, 3], [5, 6])
        assert self.token_ids(choice.draft(1, [1, 2], 2)) == []
        assert self.token_ids(choice.draft(0, [1, 2], 1)) == [3]
        assert self.token_ids(choice.draft(1, [1, 2, 8, 1], 1)) == [2]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("cost", "after_a_match", "without"), [(0.2, None, None), (1.5, [4], None), (3.0, [4], [])]
    )
    def test_the_student_is_asked_where_it_writes_more(
        self, kind: type[StudentEstimate], cost: float, after_a_match: list[int] | None, without: list[int] | None
    ) -> None:
        """Three tokens a cycle are much for the cost of about one call, and little for that of four."""
        choice = self.choice([1, 2, 3, 4, 5], student=partial(kind, cost))
        for _ in range(60):
            choice.learn(0, 3, asked=True)
        assert self.token_ids(choice.draft(0, [1, 2, 3], 1)) == after_a_match
        assert self.token_ids(choice.draft(0, [1, 2, 3, 8], 1)) == without

    @pytest.mark.parametrize(("kind", "cost"), [(LoneStudent, 1.0), (JoiningStudent, 1.0)])
    def test_an_unknown_student_is_tried_where_no_draft_helps(self, kind: type[StudentEstimate], cost: float) -> None:
        choice = self.choice([1, 2, 3, 1, 2, 3], student=partial(kind, cost))
        assert self.token_ids(choice.draft(0, [1, 2], 1)) == [3]
        assert choice.draft(0, [1, 2, 9], 1) is None

    @pytest.mark.parametrize(("kind", "cost"), [(LoneStudent, 1.0), (JoiningStudent, 1.0)])
    def test_a_poor_student_is_tried_again(self, kind: type[StudentEstimate], cost: float) -> None:
        choice = self.choice([1, 2], student=partial(kind, cost))
        for _ in range(20):
            choice.learn(0, 1, asked=True)
        pauses = 0
        while self.token_ids(choice.draft(0, [9], 1)) == []:
            choice.learn(0, 1, asked=False)
            pauses += 1
        assert 10 < pauses < 500

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_good_student_keeps_its_average(self, kind: type[StudentEstimate]) -> None:
        choice = self.choice([1, 2, 3], student=partial(kind, 0.5))
        for _ in range(60):
            choice.learn(0, 3, asked=True)
        for _ in range(1000):
            choice.learn(0, 1, asked=False)
        assert 1 + COPY_RATES[0] > EXPECTED_SPEED  # so an average that had returned to the first would lose to the copy
        assert choice.draft(0, [1], 1) is None

    def test_a_joining_student_gains_where_other_sources_expect_nothing(self) -> None:
        """Copies that are right with it or without it are no gain; a token that they did not expect is one of the
        uncovered part."""
        student = JoiningStudent(0.0)
        certain = TextDraft([2], [-1], 1, 1.0, 2.0, covered=1.0)
        for num_tokens in (2, 9):
            student.learn(num_tokens, certain, asked=True)
        nothing = TextDraft([], [], 0, 1.0, 1.0)
        assert student.expected_speed(nothing) == 1 + EXPECTED_GAIN
        assert student.expected_speed(certain) == 2.0
        for _ in range(200):
            student.learn(3, nothing, asked=True)
        assert student.expected_speed(nothing) == pytest.approx(3.0)
        half = TextDraft([2], [-1], 1, 1.0, 1.5, covered=0.5)
        assert student.expected_speed(half) == pytest.approx(1.5 + 0.5 * 2.0)

    def test_what_a_student_costs(self) -> None:
        late = tiny_predictor(correction=None, slot_layers=1, num_layers=3)
        assert cost_of_student(late, 4) < STUDENT_COST < cost_of_student(tiny_predictor(), 4) == STUDENT_COST_IN_CACHE
        assert cost_of_student(late, 1) < cost_of_student(late, 4)
        assert cost_of_student(tiny_predictor(correction=None, slot_layers=0), 1) < cost_of_student(late, 1)

    def test_without_a_student_one_token_is_read(self) -> None:
        assert self.token_ids(self.choice([1, 2]).draft(0, [9], 1)) == []
        assert self.token_ids(self.choice([1, 2]).draft(0, [1], 0)) == []


def test_what_a_draft_covers() -> None:
    """The tokens after the newest one count, not those after them."""
    drafter = TextDrafter([1, 2, 3, 1], NONE)
    draft = drafter.draft(3)
    assert draft.parents[:2] == [-1, 0] and draft.covered == pytest.approx(COPY_RATES[0])
    assert TextDrafter([1], NONE).draft(3).covered == 0
