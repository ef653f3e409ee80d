"""Drafts: the tokens that the slots of a call predict, after correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.models.correction.correction import CorrectionHead
from ptp_lightning.models.correction.draft_order import draft_left_to_right, refine_draft
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.sampling import Sampler


class Drafter(Protocol):
    """Chooses drafted tokens from slot logits. Any tokens are allowed; correct ones save calls."""

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """Tokens `starts[b]` .. `starts[b] + J - 1` of the new text of each row.

        Args:
            slot_logits: `[B, J, N]`, J >= 1, of the tokens that slots can draft.
            auxiliaries: `[B, J]`, of the drafted tokens.
            starts: number of new tokens of each row before the first drafted one.

        Returns:
            `[B, J]` int64.
        """
        ...


@dataclass(frozen=True)
class StudentDrafter:
    """The tokens that the student's objective reads from slot logits.

    Args:
        objective: of the predictor.
        sampling: of the text.
    """

    objective: Objective
    sampling: Sampler

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """See `Drafter`."""
        return self.objective.tokens_from_logits(slot_logits.float(), auxiliaries, self.sampling)


def draft_windows(
    context: BatchContext, drafter: Drafter, first: Tensor, slots: Tensor, starts: Sequence[int]
) -> Tensor:
    """Draft a window after the kept tokens of each row; its first token is exact.

    Args:
        context: the texts.
        drafter: chooses the tokens.
        first: `[B, 1]`, the base model's own picks.
        slots: `[B, J, H]`, last hidden states of slots that stand for the first token and the tokens after it.
        starts: number of new tokens of each row before the first.

    Returns:
        Token ids `[B, J + 1]`.
    """
    num_slots = slots.shape[1]
    if num_slots == 0:
        return first
    predictor = context.predictor
    drafted = [start + 1 for start in starts]
    auxiliaries = context.auxiliaries(drafted, num_slots)
    if predictor.corrects_left_to_right:
        assert isinstance(predictor.correction, CorrectionHead), "no other correction runs in this order"
        next_logits = predictor.correction.next_logits(slots, predictor.slot_logits)

        def predict_next(slot: int, token_ids: Tensor) -> Tensor:
            logits = context.penalized_slots(next_logits(slot, predictor.embed(token_ids)), first)
            return drafter(logits, auxiliaries[:, slot : slot + 1], [start + slot for start in drafted])

        return draft_left_to_right(first, num_slots, predict_next)

    def slot_logits(hidden: Tensor) -> Tensor:
        return context.penalized_slots(predictor.slot_logits(hidden), first)

    def predict_again(token_ids: Tensor) -> Tensor:
        return drafter(slot_logits(context.correct(slots, token_ids)), auxiliaries, drafted)

    draft = torch.cat([first, drafter(slot_logits(slots), auxiliaries, drafted)], dim=1)
    return refine_draft(draft, predictor.num_refinement_steps, predict_again)
