"""CycleChoice: whether the next cycle of a text copies a draft, asks the student for one, or reads a single token."""

from __future__ import annotations

from collections.abc import Sequence

from ptp_lightning.decoding.text_lookup import TextLookup

# Costs are in calls that read one token; measured on SmolLM2 in bfloat16, two cores.
TOKEN_COST = 0.026
"""Of each further token that a call reads."""
STUDENT_COST = 2.6
"""Of a cycle in which the student drafts, with slots in all layers."""
LATE_STUDENT_COST = 1.65
"""Of a cycle in which the student drafts, with slots in 12 of 30 layers."""
EXPECTED_COPY = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
"""New tokens of a cycle with a copy after a match of 1, 2, .. tokens, before any is measured. Chats of SmolLM2 have
1.5, 2.4, 3.0, 3.5, 3.8 and 6.4 at temperature 0.7; short matches are overestimated, so that they are tried."""
EXPECTED_SPEED = 1.3
"""New tokens of a student's cycle divided by its cost, before any is measured."""
LEARNING_RATE = 0.1
"""Weight of a cycle in the moving averages of its text."""
RETRY_RATE = 0.02
"""Weight of `EXPECTED_SPEED` in the student's average after a cycle that read one token: so it is tried again."""


class CycleChoice:
    """The choices for B texts.

    Each cycle is the one that is expected to write most tokens for its cost, by the averages of the text so far: a
    copy, for each length of its match, a draft of the student, or one token. So a good student is not interrupted by
    poor copies, and where neither is right often, as at high temperatures, a text takes hardly longer than with one
    token a call.

    Args:
        prompts: token ids of all texts, at least one each.
        student_cost: of its cycles, in calls that read one token; None without a student.

    >>> choice = CycleChoice([[1, 2, 3, 9, 4, 5]], student_cost=None)
    >>> choice.draft(0, [1, 2], size=3)  # 1, 2 was followed by 3, 9, 4
    [3, 9, 4]
    >>> choice.draft(0, [1, 2, 7], size=3)
    []
    """

    def __init__(self, prompts: Sequence[Sequence[int]], student_cost: float | None) -> None:
        self._texts = [_Text(prompt, student_cost) for prompt in prompts]

    def draft(self, text: int, new: Sequence[int], size: int) -> list[int] | None:
        """Copied tokens; none if one token should be read alone, and None if the student should draft.

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

    >>> [num_copied(match) for match in (1, 2, 6)]
    [3, 5, 13]
    """
    return 2 * match + 1


def _copy_cost(match: int) -> float:
    return 1 + TOKEN_COST * num_copied(match)


class _Text:
    """One text; the new tokens of its copies, for each length of the match, and of its student's cycles, by cost."""

    def __init__(self, prompt: Sequence[int], student_cost: float | None) -> None:
        self._lookup = TextLookup(prompt)
        self._num_prompt = len(prompt)
        self._student_cost = student_cost
        self._student = 0.0 if student_cost is None else EXPECTED_SPEED
        self._copies = {match: number / _copy_cost(match) for match, number in enumerate(EXPECTED_COPY, start=1)}
        self._copied = 0  # length of the match of the latest draft; 0 if nothing was copied

    def draft(self, new: Sequence[int], size: int) -> list[int] | None:
        self._lookup.extend(new[len(self._lookup) - self._num_prompt :])
        best_other = max(self._student, 1.0)
        match = self._lookup.longest_match()
        if match is not None and self._copies[match.length] > best_other:
            self._copied = match.length
            return self._lookup.copy(match, min(size, num_copied(match.length)))
        self._copied = 0
        return None if self._student >= best_other else []

    def learn(self, num_tokens: int, is_student: bool) -> None:
        if self._student_cost is not None and is_student:
            self._student += LEARNING_RATE * (num_tokens / self._student_cost - self._student)
        elif self._copied:
            speed = num_tokens / _copy_cost(self._copied)
            self._copies[self._copied] += LEARNING_RATE * (speed - self._copies[self._copied])
        elif self._student_cost is not None:
            self._student += RETRY_RATE * (EXPECTED_SPEED - self._student)
