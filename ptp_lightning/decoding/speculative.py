"""Speculative decoding: the student proposes a window, the base model verifies it (Draxler et al., ICLR 2026, Alg. 1).

The committed text is what the reference decoder gives for the same u, token for token, whatever the drafts are:
drafts only decide how many calls it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.generation import (
    CachedContext,
    Decoded,
    GenerationSettings,
    OnTokens,
    VerifiedOutput,
    require_room,
)
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.models.refiner import refine_draft
from ptp_lightning.models.slots import Objective
from ptp_lightning.sampling import Sampler


class Proposer(Protocol):
    """Turns slot logits into the draft of a window; any tokens will do, right ones save calls."""

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, start: int) -> Tensor:
        """Tokens start .. start + J - 1 of the new text.

        Args:
            slot_logits: `[1, J, V]`, J >= 1.
            auxiliaries: `[1, J]`, of the tokens to be proposed.
            start: number of new tokens before the first proposed one.

        Returns:
            `[1, J]` int64.
        """
        ...


@dataclass(frozen=True)
class StudentProposer:
    """What the slots were trained to say.

    Args:
        objective: of the predictor.
        sampling: of the text.
    """

    objective: Objective
    sampling: Sampler

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, start: int) -> Tensor:
        """See `Proposer`."""
        return self.objective.propose(slot_logits.float(), auxiliaries, self.sampling)


@torch.inference_mode()
def decode_speculatively(
    predictor: ParallelTokenPredictor,
    prompt_ids: Tensor,
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    proposer: Proposer | None = None,
) -> Decoded:
    """Cycles of two calls, or three with a student's copy, that commit `accepted = correct + 1` tokens.

    The propose call reads the tokens that the cache lacks (the prompt, later the newest token) and the slots after
    them. The base model's own logits give the first token of the window, t_1 = Pick(u_1, Q_1); slot j gives token
    j + 2. Where the student is a copy of the base model, its slots have a call of their own, in which it also reads
    what has been committed since. The verify call reads this draft with the gate closed. The longest prefix in which
    every token is the base model's pick is correct (1 .. L tokens, for t_1 always is), and the base model's pick after
    it is committed as well, be it the correction of a wrong token or a bonus after the last.

    The draft leaves room for that last pick, so windows shrink towards the end of the text. A single remaining
    token is t_1 of a propose call and needs no verification.

    Args:
        predictor: in eval mode.
        prompt_ids: `[1, S]` int64, S >= 1, on the predictor's device.
        settings: sampling settings other than the predictor's own cost correct tokens, not exactness.
        on_tokens: is called once a cycle with the committed tokens.
        proposer: makes the drafts; by default the predictor.

    Raises:
        ValueError: the prompt is empty, or too long for `max_new_tokens` more.
    """
    require_room(predictor, prompt_ids.shape[1], settings)
    auxiliaries = settings.auxiliaries(prompt_ids.device)
    context = CachedContext(predictor, settings.sampling)
    if proposer is None:
        proposer = StudentProposer(predictor.config.objective, context.sampling)
    output = VerifiedOutput(settings, on_tokens)
    correct_per_cycle: list[int] = []

    unread = prompt_ids
    while output.finished is None:
        start = len(output.token_ids)
        length = max(1, min(settings.window_length, output.remaining - 1))
        window = slice(start, start + length)

        # Propose.
        hidden = context.read(unread, auxiliaries[:, window])[:, -length:]
        first = pick(auxiliaries[:, start : start + 1], context.sampling.distribution(predictor.logits(hidden[:, :1])))
        draft = _draft(context, first, hidden[:, 1:], auxiliaries[:, start + 1 : start + length], proposer, start + 1)
        if output.remaining == 1:
            output.commit(draft[0].tolist())
            correct_per_cycle.append(1)
            break

        # Verify: picks[j] is what the base model says after draft[j].
        distribution = context.sampling.distribution(predictor.logits(context.read(draft)))
        picks = pick(auxiliaries[:, start + 1 : start + length + 1], distribution)
        correct = 1 + (draft[:, 1:] == picks[:, :-1]).cumprod(dim=1).sum(dim=1, keepdim=True)

        # Commit. The correct part of the draft is picks shifted by one. This is the cycle's one wait for the device.
        num_correct, *tokens = torch.cat([correct, draft[:, :1], picks], dim=1)[0].tolist()
        context.forget(length - num_correct)
        unread = picks[:, num_correct - 1 : num_correct]
        num_committed = output.commit(tokens[: num_correct + 1])
        correct_per_cycle.append(min(num_correct, num_committed))
    assert output.finished is not None
    return Decoded(output.token_ids, context.num_calls, output.finished, correct_per_cycle)


def _draft(
    context: CachedContext, first: Tensor, slots: Tensor, auxiliaries: Tensor, proposer: Proposer, start: int
) -> Tensor:
    """The first token `[1, 1]` and what slots `[1, J, H]` propose after it, refined if they can be: `[1, J + 1]`."""
    if slots.shape[1] == 0:
        return first
    predictor = context.predictor

    def propose_again(token_ids: Tensor) -> Tensor:
        return proposer(predictor.slot_logits(context.refine(slots, token_ids)), auxiliaries, start)

    draft = torch.cat([first, proposer(predictor.slot_logits(slots), auxiliaries, start)], dim=1)
    return refine_draft(draft, predictor.refinement_rounds, propose_again)
