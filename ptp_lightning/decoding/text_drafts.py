"""TextDrafter: drafts of a text that need no network, from the text itself and from n-grams of training text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.decoding.text_lookup import TextLookup
from ptp_lightning.decoding.token_tree import TokenTree
from ptp_lightning.ngrams import MAX_CONTEXT, Continuations

# Costs are in calls that read one token; measured on CPUs. The first drafted token is free there, since products of a
# single row double it (see `PackedLinear`).
TOKEN_COST = 0.02
"""Of each further token that a call reads."""
BRANCH_COST = 0.05
"""Of each further path of a tree: it has an attention of its own in each layer."""
USUAL_SPEED = 1.8
"""New tokens for the cost of one call. What a token costs is lost elsewhere at this rate."""
MAX_TOKENS = 12
"""Of a draft."""
COPY_RATES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Probability that the next token is copied, after a match of 1, 2, .. tokens, before a text shows its own."""
NGRAM_RATE = 0.7
"""Of the tokens that are not copied, the part that n-grams are right about, likewise: a text is not training text."""
STUDENT_RATE = 0.75
"""Of the tokens that are not copied, the part that a student is right about where it was asked, and n-grams are not."""
SMALLEST_RATE = 0.001
"""Of the first two, so that what was wrong for a long time can be found to be right."""
LEARNING_RATE = 0.1
"""Weight of a token of the text in these averages. Chats of SmolLM2 gain nothing from 0.05."""

StudentTokens = Mapping[tuple[int, ...], Sequence[tuple[int, float]]]
"""Tokens that a student drafts after paths of drafted tokens, and the probability of each to be correct."""
NO_STUDENT: StudentTokens = {}


class TextDraft(NamedTuple):
    """A tree of drafted tokens after the newest token.

    Attributes:
        token_ids: M tokens, parents before children.
        parents: index of the token before each; -1 is the newest token.
        depth: number of tokens of the longest path.
        cost: of the call that verifies it, in calls that read one token.
        expected_tokens: new tokens of a cycle that verifies it, as estimated: its correct ones and the pick after.
        covered: probability that the next token is one of those drafted for it, likewise.
    """

    token_ids: list[int]
    parents: list[int]
    depth: int
    cost: float
    expected_tokens: float
    covered: float = 0.0

    @property
    def expected_speed(self) -> float:
        """New tokens for the cost of a call that reads one token."""
        return self.expected_tokens / self.cost


def joined_tree(newest: Tensor, drafts: Sequence[TextDraft]) -> TokenTree:
    """The drafts of B texts as one tree, whose roots are the newest tokens `[B, 1]`.

    Shorter drafts are filled up with tokens that nobody expects. If the base model picks one of them nevertheless, it
    is correct like any other.

    >>> drafts = [TextDraft([4, 5], [-1, -1], 1, 1.1, 1.9), TextDraft([6], [-1], 1, 1.0, 1.5)]
    >>> joined_tree(torch.tensor([[7], [8]]), drafts)
    TokenTree(token_ids=tensor([[7, 4, 5],
            [8, 6, 0]]), parents=tensor([[0, 0, 0],
            [0, 0, 0]]), is_chain=False)
    """
    size = max(len(draft.token_ids) for draft in drafts)
    padding = [size - len(draft.token_ids) for draft in drafts]
    token_ids = [[*draft.token_ids, *[0] * more] for draft, more in zip(drafts, padding, strict=True)]
    drafted = torch.cat([newest, newest.new_tensor(token_ids).view(len(drafts), size)], dim=1)
    if all(draft.depth == len(draft.token_ids) for draft in drafts):
        return TokenTree.chain(drafted)
    parents = [
        [0, *(parent + 1 for parent in draft.parents), *[0] * more] for draft, more in zip(drafts, padding, strict=True)
    ]
    return TokenTree(drafted, newest.new_tensor(parents))


class TextDrafter:
    """Drafts of one text.

    The next token is copied with some probability, which depends on the length of the match (`TextLookup`). Else it is
    one that often follows in training text, as far as such text tells, or one that a student drafts, where it was
    asked. A draft is the tree of the tokens that are likeliest to be correct. The probabilities of copies and n-grams
    are learned from each new token of the text, whoever drafted it.

    Args:
        prompt: token ids, at least one.
        continuations: of training text.
        branches: whether drafts may be trees; a chain has the likeliest token of each place alone.
        end_of_text: tokens after which no others are drafted.

    >>> drafter = TextDrafter([1, 2, 3, 1], {})
    >>> drafter.extend([2])
    >>> drafter.draft(max_depth=2)[:3]  # 1, 2 was followed by 3 and 1
    ([3, 1], [-1, 0], 2)
    """

    def __init__(
        self,
        prompt: Sequence[int],
        continuations: Continuations,
        branches: bool = True,
        end_of_text: Collection[int] = (),
    ) -> None:
        self._lookup = TextLookup(prompt)
        self._num_prompt = len(prompt)
        self._continuations = continuations
        self._branches = branches
        self._end_of_text = frozenset(end_of_text)
        self._copy_rates = list(COPY_RATES)
        self._ngram_rate = NGRAM_RATE

    def extend(self, new: Sequence[int]) -> None:
        """Take note of new tokens.

        Args:
            new: all new tokens of the text; those of earlier calls are its beginning.
        """
        for token in new[len(self._lookup) - self._num_prompt :]:
            self._learn(token)
            self._lookup.append(token)

    def draft(self, max_depth: int, student: StudentTokens = NO_STUDENT) -> TextDraft:
        """The tokens that are likeliest to be correct, at most `max_depth` one after the other.

        Args:
            max_depth: the largest number of tokens that follow each other.
            student: what a student drafts. What it cost is not part of the draft's cost.
        """
        token_ids: list[int] = []
        parents: list[int] = []
        depth, cost, expected_tokens, covered, order = 0, 1.0, 1.0, 0.0, count()
        waiting: list[tuple[float, int, int, tuple[int, ...]]] = []

        def follow(path: tuple[int, ...], parent: int, probability: float) -> None:
            if len(path) < max_depth and not self._end_of_text.intersection(path[-1:]):
                for token, rate in self._followers(path, student.get(path, ())):
                    heappush(waiting, (-probability * rate, next(order), parent, (*path, token)))

        follow((), -1, 1.0)
        while waiting and len(token_ids) < MAX_TOKENS:
            negative, _, parent, path = heappop(waiting)
            more = TOKEN_COST + BRANCH_COST * (parent in parents) if token_ids else 0.0
            if -negative >= USUAL_SPEED * more:
                token_ids.append(path[-1])
                parents.append(parent)
                depth, cost, expected_tokens = max(depth, len(path)), cost + more, expected_tokens - negative
                covered -= negative if parent < 0 else 0.0
                follow(path, len(token_ids) - 1, -negative)
        return TextDraft(token_ids, parents, depth, cost, expected_tokens, covered)

    def _followers(self, path: Sequence[int], of_student: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        """Tokens that may follow the text and a path after it, with their probabilities."""
        found: dict[int, float] = {}
        match = self._lookup.longest_match(path)
        copy_rate = 0.0
        if match is not None:
            copy_rate = self._copy_rates[match.length - 1]
            found[match.follower] = copy_rate
        student_rate = STUDENT_RATE if of_student else 0.0
        sources = ((student_rate, of_student), ((1 - student_rate) * self._ngram_rate, self._likely(path)))
        for rate, tokens in sources:
            for token, probability in tokens:
                found[token] = found.get(token, 0.0) + (1 - copy_rate) * rate * probability
        if self._branches or not found:
            return list(found.items())
        return [max(found.items(), key=lambda item: item[1])]

    def _likely(self, path: Sequence[int]) -> Sequence[tuple[int, float]]:
        """Continuations of the longest context that has some."""
        tail = self._lookup.tail(path)
        for length in range(min(MAX_CONTEXT, len(tail)), 0, -1):
            if found := self._continuations.get(tail[-length:]):
                return found
        return ()

    def _learn(self, token: int) -> None:
        """Move both rates towards what the next token of the text shows: a step of expectation maximisation."""
        match, likely = self._lookup.longest_match(), self._likely(())
        is_copied = 0.0  # the probability of it, given the token
        if match is not None:
            copy_rate = self._copy_rates[match.length - 1]
            if token == match.follower:
                probability = sum(probability for other, probability in likely if other == token)
                is_copied = copy_rate / (copy_rate + (1 - copy_rate) * self._ngram_rate * probability)
            self._copy_rates[match.length - 1] = _moved(copy_rate, is_copied - copy_rate)
        expected = self._ngram_rate * sum(probability for _, probability in likely)
        is_found = any(token == other for other, _ in likely)
        self._ngram_rate = _moved(self._ngram_rate, (1 - is_copied) * (is_found - expected))


def _moved(rate: float, error: float) -> float:
    return min(max(rate + LEARNING_RATE * error, SMALLEST_RATE), 1.0)
