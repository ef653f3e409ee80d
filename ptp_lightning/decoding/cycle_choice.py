"""CycleChoice: whether a cycle drafts without a network, asks the student as well, or reads a single token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from ptp_lightning.decoding.text_drafts import StudentTokens, TextDraft, TextDrafter
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.ngrams import Continuations

# What asking the student costs beside the call that verifies its draft, in calls that read one token; measured on CPUs.
STUDENT_COST = 1.6
"""With slots in all layers; of SmolLM2, bfloat16, two threads."""
STUDENT_COST_IN_CACHE = 2.6
"""The same of a model of at most `CACHE_BYTES`, whose weights stay in a processor's cache. There a call costs what its
operations cost, and a cycle has many. Of the shipped code model, float32, one thread."""
CACHE_BYTES = 2**25
"""Of a base model's weights; about the size of a processor's last cache."""
LATE_SLOTS_COST = 0.02
"""Of making the slots of a cycle that follow the newest token; of SmolLM2, bfloat16, two threads."""
LATE_LAYER_COST = 0.02
"""Of each layer that they run through, likewise."""
LATE_DRAFT_COST = 0.04
"""Of drafting from each of them, likewise."""
EXPECTED_SPEED = 1.02
"""New tokens of a student's cycle for its cost, before any is known: it is tried where no other draft helps."""
EXPECTED_GAIN = 0.4
"""New tokens that a student adds where no other draft helps, before any is known; more if asking it costs more."""
LEARNING_RATE = 0.1
"""Weight of a student's cycle in its moving average."""
RETRY_RATE = 0.01
"""Part of the way that a low average returns to its first value in each other cycle, to try the student again."""

NO_DRAFT = TextDraft([], [], 0, 1.0, 1.0)


def cost_of_student(predictor: PredictorNetwork, num_slots: int) -> float:
    """What it costs to ask the student on a CPU, in calls that read one token.

    Args:
        predictor: with the student.
        num_slots: J, of its drafts.
    """
    if predictor.first_slot_layer:
        assert predictor.config.slot_layers is not None, "slots enter late"
        return LATE_SLOTS_COST + LATE_LAYER_COST * predictor.config.slot_layers + LATE_DRAFT_COST * num_slots
    num_bytes = sum(weight.nbytes for weight in predictor.base_model.parameters())
    return STUDENT_COST_IN_CACHE if num_bytes <= CACHE_BYTES else STUDENT_COST


class StudentEstimate(Protocol):
    """What a student's cycles are worth in one text."""

    def expected_speed(self, draft: TextDraft) -> float:
        """New tokens for the cost of a cycle that asks the student, where the best draft without it is `draft`."""
        ...

    def learn(self, num_tokens: int, draft: TextDraft, asked: bool) -> None:
        """Take note of a cycle that wrote `num_tokens`, with the student or without, where `draft` was expected."""
        ...


class LoneStudent(StudentEstimate):
    """Its own draft is verified alone: tokens for the cost of its cycles are an average.

    Args:
        cost: see `cost_of_student`.
    """

    def __init__(self, cost: float) -> None:
        self._cost = 1 + cost
        self._speed = EXPECTED_SPEED

    def expected_speed(self, draft: TextDraft) -> float:
        """See `StudentEstimate`."""
        return self._speed

    def learn(self, num_tokens: int, draft: TextDraft, asked: bool) -> None:
        """See `StudentEstimate`."""
        if asked:
            self._speed += LEARNING_RATE * (num_tokens / self._cost - self._speed)
        elif self._speed < EXPECTED_SPEED:
            self._speed += RETRY_RATE * (EXPECTED_SPEED - self._speed)


class JoiningStudent(StudentEstimate):
    """What it expects is one source of the draft among others: how many tokens that adds is an average.

    It adds none where the draft without it covers the next token already.

    Args:
        cost: see `cost_of_student`.
    """

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._gain = self._first_gain = max(EXPECTED_GAIN, EXPECTED_SPEED * (1 + cost) - 1)

    def expected_speed(self, draft: TextDraft) -> float:
        """See `StudentEstimate`."""
        return (draft.expected_tokens + self._gain * (1 - draft.covered)) / (draft.cost + self._cost)

    def learn(self, num_tokens: int, draft: TextDraft, asked: bool) -> None:
        """See `StudentEstimate`."""
        uncovered = 1 - draft.covered
        if asked:
            self._gain += LEARNING_RATE * uncovered * (num_tokens - draft.expected_tokens - self._gain * uncovered)
        elif self._gain < self._first_gain:
            self._gain += RETRY_RATE * (self._first_gain - self._gain)


class CycleChoice:
    """The choices for B texts.

    Each cycle is the one that is expected to write most tokens for its cost: by what the student was worth in the text
    so far, and by what `TextDrafter` expects of its own draft. So copies are not delayed, a poor student is seldom
    asked, and where nothing is right often, as at high temperatures, a text takes hardly longer than with one token a
    call.

    Args:
        prompts: token ids of all texts, at least one each.
        continuations: of training text.
        student: makes the estimate of one text; None without a student.
        branches: see `TextDrafter`.
        end_of_text: likewise.

    >>> choice = CycleChoice([[1, 2, 3, 9, 4, 5]], {}, student=None)
    >>> choice.draft(0, [1, 2], max_depth=2).token_ids  # 1, 2 was followed by 3, 9
    [3, 9]
    >>> choice.draft(0, [1, 2, 7], max_depth=2).token_ids  # one token is read
    []
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Continuations,
        student: Callable[[], StudentEstimate] | None,
        branches: bool = True,
        end_of_text: Collection[int] = (),
    ) -> None:
        self._drafters = [TextDrafter(prompt, continuations, branches, end_of_text) for prompt in prompts]
        self._students = None if student is None else [student() for _ in prompts]
        self._drafts = [NO_DRAFT] * len(prompts)  # the latest, without the student

    def draft(self, text: int, new: Sequence[int], max_depth: int) -> TextDraft | None:
        """A draft without a network, empty if one token should be read; None if the student should be asked.

        Args:
            text: index of the prompt.
            new: all new tokens of the text; those of earlier calls are its beginning.
            max_depth: the largest number of tokens that follow each other.
        """
        drafter = self._drafters[text]
        drafter.extend(new)
        draft = self._drafts[text] = drafter.draft(max_depth)
        if self._students is None or draft.expected_speed >= self._students[text].expected_speed(draft):
            return draft
        return None

    def draft_with_student(self, text: int, max_depth: int, student: StudentTokens) -> TextDraft:
        """A draft of what the student and all other sources expect, after `draft`, with the same arguments."""
        return self._drafters[text].draft(max_depth, student)

    def learn(self, text: int, num_tokens: int, asked: bool) -> None:
        """Take note of how many new tokens the latest cycle of a text wrote, and whether the student was asked."""
        if self._students is not None:
            self._students[text].learn(num_tokens, self._drafts[text], asked)
