"""StudentDraft: the windows that the student drafts, as in decoding; no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.models.context import Context
from ptp_lightning.models.correction.draft_order import draft_left_to_right, refine_draft
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.chunks import map_chunks


class StudentDraft(NamedTuple):
    """Windows as the student drafts them.

    Attributes:
        token_ids: `[B, N, L]` int64.
        slots: `[B, N, L - 1, ..]`, the slots' last hidden states before any correction.
        hidden: `[B, N, L - 1, ..]`, the slots' last hidden states, corrected if there is a correction, for
            `PredictorNetwork.slot_logits`; they predict all but the first token.
    """

    token_ids: Tensor
    slots: Tensor
    hidden: Tensor


@torch.no_grad()
def student_draft(
    predictor: PredictorNetwork, context: Context, auxiliaries: Tensor, first_token_ids: Tensor
) -> StudentDraft:
    """Draft windows as in decoding: one pass over all slots, then the correction.

    Args:
        predictor: base model and student; dropout is switched off meanwhile.
        context: of `predictor.encode`.
        auxiliaries: `[B, N, L]` float64 in [0, 1).
        first_token_ids: `[B, N]`, picked from the base model's own distributions.
    """
    objective, sampling = predictor.config.objective, context.sampling
    first, later = first_token_ids.unsqueeze(-1), auxiliaries[..., 1:]

    def tokens_from_slots(slots: Tensor, u: Tensor) -> Tensor:
        """Tokens `[..]` that slots `[.., H]` draft with auxiliaries `[..]`."""
        chunks = map_chunks(
            lambda chunk, own: objective.tokens_from_logits(predictor.slot_logits(chunk).float(), own, sampling),
            slots.flatten(0, -2),
            u.flatten(),
        )
        return torch.cat(chunks).view_as(u)

    with without_dropout(predictor):
        slots = hidden = predictor.slot_hidden(context, auxiliaries, first_token_ids)
        pairs = predictor.correction_context(context)

        def correct(token_ids: Tensor) -> Tensor:
            nonlocal hidden
            hidden = predictor.correct(context, pairs, slots, token_ids)
            return tokens_from_slots(hidden, later)

        def correct_slot(slot: int, token_ids: Tensor) -> Tensor:
            own = slice(slot, slot + 1)
            return tokens_from_slots(predictor.correct(context, None, slots[:, :, own], token_ids), later[:, :, own])

        if predictor.corrects_left_to_right:
            draft = draft_left_to_right(first, slots.shape[2], correct_slot)
            hidden = predictor.correct(context, None, slots, draft[..., :-1])
        else:
            draft = torch.cat([first, tokens_from_slots(slots, later)], dim=-1)
            draft = refine_draft(draft, predictor.num_refinement_steps, correct)
    return StudentDraft(draft, slots, hidden)


@contextmanager
def without_dropout(predictor: PredictorNetwork) -> Iterator[None]:
    """Put the predictor in eval mode meanwhile."""
    mode = predictor.training
    predictor.eval()
    try:
        yield
    finally:
        predictor.train(mode)
