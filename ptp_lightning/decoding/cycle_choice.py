"""CycleChoice: whether the next cycle of a text drafts without a network, asks the student, or reads a single token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ptp_lightning.decoding.text_drafts import TextDraft, TextDrafter
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.ngrams import Continuations

# Costs of a cycle in which the student drafts, in calls that read one token; measured on CPUs.
STUDENT_COST = 2.6
"""With slots in all layers; of SmolLM2, bfloat16, two threads."""
STUDENT_COST_IN_CACHE = 3.6
"""The same of a model of at most `CACHE_BYTES`, whose weights stay in a processor's cache. There a call costs what its
operations cost, and a cycle has many. Of the shipped code model, float32, one thread."""
CACHE_BYTES = 2**25
"""Of a base model's weights; about the size of a processor's last cache."""
LATE_STUDENT_COST = 1.65
"""With slots in 12 of 30 layers; of SmolLM2, bfloat16, two threads."""
EXPECTED_SPEED = 1.02
"""New tokens of a student's cycle divided by its cost, before any is known: it is tried where no other draft helps."""
LEARNING_RATE = 0.1
"""Weight of a student's cycle in its moving average."""
RETRY_RATE = 0.01
"""Part of the way that a lower average returns to `EXPECTED_SPEED` in each other cycle, to try the student again."""


def cost_of_student(predictor: PredictorNetwork) -> float:
    """What a cycle of its student costs on a CPU, in calls that read one token."""
    if predictor.first_slot_layer:
        return LATE_STUDENT_COST
    num_bytes = sum(weight.nbytes for weight in predictor.base_model.parameters())
    return STUDENT_COST_IN_CACHE if num_bytes <= CACHE_BYTES else STUDENT_COST


class CycleChoice:
    """The choices for B texts.

    Each cycle is the one that is expected to write most tokens for its cost: by the student's average of the text so
    far, and by what `TextDrafter` expects of its own draft. So a good student is not interrupted by poor drafts, and
    where none is right often, as at high temperatures, a text takes hardly longer than with one token a call.

    Args:
        prompts: token ids of all texts, at least one each.
        continuations: of training text.
        student_cost: of its cycles, in calls that read one token; None without a student.
        branches: see `TextDrafter`.
        end_of_text: likewise.

    >>> choice = CycleChoice([[1, 2, 3, 9, 4, 5]], {}, student_cost=None)
    >>> choice.draft(0, [1, 2], max_depth=2).token_ids  # 1, 2 was followed by 3, 9
    [3, 9]
    >>> choice.draft(0, [1, 2, 7], max_depth=2).token_ids  # one token is read
    []
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Continuations,
        student_cost: float | None,
        branches: bool = True,
        end_of_text: Collection[int] = (),
    ) -> None:
        self._drafters = [TextDrafter(prompt, continuations, branches, end_of_text) for prompt in prompts]
        self._student_cost = student_cost
        self._student_speeds = [EXPECTED_SPEED] * len(prompts)

    def draft(self, text: int, new: Sequence[int], max_depth: int) -> TextDraft | None:
        """A draft without a network, empty if one token should be read; None if the student should draft.

        Args:
            text: index of the prompt.
            new: all new tokens of the text; those of earlier calls are its beginning.
            max_depth: the largest number of tokens that follow each other.
        """
        drafter = self._drafters[text]
        drafter.extend(new)
        draft = drafter.draft(max_depth)
        if self._student_cost is None or draft.expected_speed >= self._student_speeds[text]:
            return draft
        return None

    def learn(self, text: int, num_tokens: int, is_student: bool) -> None:
        """Take note of how many new tokens the latest cycle of a text wrote, the student's or that of `draft`."""
        if self._student_cost is None:
            return
        speed = self._student_speeds[text]
        if is_student:
            speed += LEARNING_RATE * (num_tokens / self._student_cost - speed)
        elif speed < EXPECTED_SPEED:
            speed += RETRY_RATE * (EXPECTED_SPEED - speed)
        self._student_speeds[text] = speed
