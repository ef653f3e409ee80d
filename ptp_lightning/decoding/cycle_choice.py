"""CycleChoice: whether a cycle drafts without a network, asks the student as well, or reads a single token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ptp_lightning.decoding.text_drafts import StudentTokens, TextDraft, TextDrafter
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.ngrams import Continuations

# What asking the student costs beside the call that verifies its draft, in calls that read one token; measured on CPUs.
STUDENT_COST = 1.4
"""With slots in all layers; of SmolLM2, bfloat16, two threads."""
STUDENT_COST_IN_CACHE = 2.4
"""The same of a model of at most `CACHE_BYTES`, whose weights stay in a processor's cache. There a call costs what its
operations cost, and a cycle has many. Of the shipped code model, float32, one thread."""
CACHE_BYTES = 2**25
"""Of a base model's weights; about the size of a processor's last cache."""
LATE_SLOTS_COST = 0.03
"""Of making the slots of a cycle that follow the newest token; of SmolLM2, bfloat16, two threads."""
LATE_LAYER_COST = 0.02
"""Of each layer that they run through, likewise."""
LATE_DRAFT_COST = 0.05
"""Of drafting from each of them, likewise."""
EXPECTED_SPEED = 1.02
"""New tokens for the cost of a cycle in which the student is asked and no other draft helps, before any is known."""
LEAST_GAIN = 0.4
"""New tokens that a student is assumed to add where no other draft helps, before any is known, at least."""
LEARNING_RATE = 0.1
"""Weight of a student's cycle in its moving average."""
RETRY_RATE = 0.01
"""Part of the way that a low gain returns to its first value in each other cycle, to try the student again."""

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


class CycleChoice:
    """The choices for B texts.

    A cycle asks the student if this is expected to write more tokens for their cost. `TextDrafter` says what its own
    draft is expected to write, and how likely it covers the next token. Where it does not, the student adds tokens; how
    many is an average over its cycles of this text. So copies are not delayed, a poor student is seldom asked, and
    where nothing is right often, as at high temperatures, a text takes hardly longer than with one token a call.

    Args:
        prompts: token ids of all texts, at least one each.
        continuations: of training text.
        student_cost: see `cost_of_student`; None without a student.
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
        self._first_gain = 0.0 if student_cost is None else max(LEAST_GAIN, EXPECTED_SPEED * (1 + student_cost) - 1)
        self._gains = [self._first_gain] * len(prompts)
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
        if self._student_cost is None:
            return draft
        gain = self._gains[text] * (1 - draft.covered)
        speed = (draft.expected_tokens + gain) / (draft.cost + self._student_cost)
        return draft if draft.expected_speed >= speed else None

    def draft_with_student(self, text: int, max_depth: int, student: StudentTokens) -> TextDraft:
        """A draft of what the student and all other sources expect, after `draft`, with the same arguments."""
        return self._drafters[text].draft(max_depth, student)

    def learn(self, text: int, num_tokens: int, asked: bool) -> None:
        """Take note of how many new tokens the latest cycle of a text wrote, and whether the student was asked."""
        gain, draft = self._gains[text], self._drafts[text]
        if asked:
            uncovered = 1 - draft.covered
            gain += LEARNING_RATE * uncovered * (num_tokens - draft.expected_tokens - gain * uncovered)
        elif gain < self._first_gain:
            gain += RETRY_RATE * (self._first_gain - gain)
        self._gains[text] = gain
