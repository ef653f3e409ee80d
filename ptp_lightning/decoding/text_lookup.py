"""TextLookup: drafts without a network, from what followed the last tokens of a text where they occurred before.

This is prompt lookup decoding (Saxena 2023, `prompt_lookup_num_tokens` in transformers), which looks in the new text as
well. Texts that quote their prompt, code and lists repeat themselves often, and students draft such tokens poorly.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_MATCH = 6
"""Of several places, that with the longest match counts; a longer match says no more than this one."""
TOKEN_COST = 0.026
"""What a token more costs that a call reads, in calls that read one token. SmolLM2, bfloat16, two cores."""
STUDENT_COST = 2.6
"""Likewise a cycle in which the student drafts, and one with late slots (12 of 30 layers):"""
LATE_STUDENT_COST = 1.65
EXPECTED_COPY = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
"""New tokens of a cycle with a copy after a match of 1, 2, .. tokens, until it is known better: as many as chats of
SmolLM2 at temperature 0.7 have."""
EXPECTED_SPEED = 1.3
"""New tokens of a cycle of the student by its cost, likewise."""
LEARNING_RATE = 0.1
"""How fast the numbers of a text replace these."""
RETRY_RATE = 0.02
"""How fast a student that is not asked is expected to be as good as ever."""


class TextLookup:
    """The prompts and new tokens of B texts, and what their cycles wrote.

    Each cycle is the one that is expected to write most tokens for its cost, by the averages of the text so far: a
    copy, for each length of its match, a draft of the student, or one token. So a good student is not interrupted by
    poor copies, and where neither is right often, as at high temperatures, a text takes hardly longer than with one
    token a call.

    Args:
        prompts: token ids of all texts, at least one each.
        student_cost: of its cycles, in calls that read one token; None without a student.

    >>> lookup = TextLookup([[1, 2, 3, 9, 4, 5]], student_cost=None)
    >>> lookup.draft(0, [1, 2], size=3)  # 1, 2 was followed by 3, 9, 4
    [3, 9, 4]
    >>> lookup.draft(0, [1, 2, 7], size=3)
    []
    """

    def __init__(self, prompts: Sequence[Sequence[int]], student_cost: float | None) -> None:
        self._texts = [_Text(prompt, student_cost) for prompt in prompts]

    def draft(self, text: int, new: Sequence[int], size: int) -> list[int] | None:
        """Tokens that may follow a text; none if one token should be read alone, and None if the student should draft.

        Args:
            text: index of the prompt.
            new: all new tokens of the text; those of earlier calls are its beginning.
            size: the largest number of tokens.
        """
        return self._texts[text].draft(new, size)

    def learn(self, text: int, num_tokens: int, is_student: bool) -> None:
        """Take note of how many new tokens the latest cycle of a text wrote, the student's or that of `draft`."""
        self._texts[text].learn(num_tokens, is_student)


def num_copied(match: int) -> int:
    """Tokens that are copied after a match of this length: after a longer one, more of them are right.

    >>> [num_copied(match) for match in (1, 2, MAX_MATCH)]
    [3, 5, 13]
    """
    return 2 * match + 1


def _copy_cost(match: int) -> float:
    return 1 + TOKEN_COST * num_copied(match)


class _Text:
    """One text: its tokens, and where each sequence of up to `MAX_MATCH` of them was last followed by another."""

    def __init__(self, prompt: Sequence[int], student_cost: float | None) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # index of the token after the latest occurrence
        self._num_prompt = len(prompt)
        self._match = 0  # length of that of the latest draft; 0 if nothing was copied
        self._student_cost = student_cost
        # New tokens of a cycle by its cost.
        self._student = 0.0 if student_cost is None else EXPECTED_SPEED
        self._copy = [number / _copy_cost(match) for match, number in enumerate(EXPECTED_COPY, start=1)]
        self._append(prompt)

    def draft(self, new: Sequence[int], size: int) -> list[int] | None:
        self._append(new[len(self._tokens) - self._num_prompt :])
        best_other = max(self._student, 1.0)
        length, start = self._longest_match()
        if length and self._copy[length - 1] > best_other:
            self._match = length
            # In a text that goes round in circles, the copy goes on with what it has copied.
            period = len(self._tokens) - start
            return [self._tokens[start + offset % period] for offset in range(min(size, num_copied(length)))]
        self._match = 0
        return None if self._student >= best_other else []

    def learn(self, num_tokens: int, is_student: bool) -> None:
        if self._student_cost is not None and is_student:
            self._student += LEARNING_RATE * (num_tokens / self._student_cost - self._student)
        elif self._match:
            before = self._copy[self._match - 1]
            self._copy[self._match - 1] += LEARNING_RATE * (num_tokens / _copy_cost(self._match) - before)
        elif self._student_cost is not None:
            self._student += RETRY_RATE * (EXPECTED_SPEED - self._student)

    def _longest_match(self) -> tuple[int, int]:
        """Its length, 0 without one, and the index of the token that followed it."""
        for length in range(min(MAX_MATCH, len(self._tokens)), 0, -1):
            start = self._after.get(tuple(self._tokens[-length:]))
            if start is not None:
                return length, start
        return 0, 0

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for length in range(1, min(MAX_MATCH, end) + 1):
                self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)
