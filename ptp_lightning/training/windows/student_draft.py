"""StudentDraft: the windows that the student drafts, as in decoding; no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.refiner.refiner import refine_draft
from ptp_lightning.training.windows.chunks import map_chunks


class StudentDraft(NamedTuple):
    """Windows as the student drafts them.

    Attributes:
        token_ids: `[B, N, L]` int64.
        hidden: `[B, N, L - 1, H]`, the slots' last hidden states, which predict all but the first token.
    """

    token_ids: Tensor
    hidden: Tensor


@torch.no_grad()
def student_draft(
    predictor: PredictorNetwork, context: Context, auxiliaries: Tensor, first_token_ids: Tensor
) -> StudentDraft:
    """Draft windows as in decoding: one pass over all slots, then the refinement steps.

    Args:
        predictor: base model and student; dropout is switched off meanwhile.
        context: of `predictor.encode`.
        auxiliaries: `[B, N, L]` float64 in [0, 1).
        first_token_ids: `[B, N]`, picked from the base model's own distributions.
    """
    objective, sampling = predictor.config.objective, context.sampling

    def tokens_from_hidden(hidden: Tensor) -> Tensor:
        chunks = map_chunks(
            lambda chunk, u: objective.tokens_from_logits(predictor.slot_logits(chunk).float(), u, sampling),
            hidden.flatten(0, 2),
            auxiliaries[..., 1:].flatten(),
        )
        return torch.cat(chunks).view_as(auxiliaries[..., 1:])

    with without_dropout(predictor):
        slots = hidden = predictor.slot_hidden(context, auxiliaries)
        draft = torch.cat([first_token_ids.unsqueeze(-1), tokens_from_hidden(hidden)], dim=-1)
        if predictor.refiner is not None:
            pairs = predictor.refiner_context(context)

            def refine(token_ids: Tensor) -> Tensor:
                nonlocal hidden
                hidden = predictor.refine(context, pairs, slots, token_ids)
                return tokens_from_hidden(hidden)

            draft = refine_draft(draft, predictor.num_refinement_steps, refine)
    return StudentDraft(draft, hidden)


@contextmanager
def without_dropout(predictor: PredictorNetwork) -> Iterator[None]:
    """Put the predictor in eval mode meanwhile."""
    mode = predictor.training
    predictor.eval()
    try:
        yield
    finally:
        predictor.train(mode)
