"""Partial Quadratic Decoding: one call verifies the last draft and drafts the next (Draxler et al., ICLR 2026).

Which tokens the next draft follows is known only after the call. So the call looks ahead after each possible number of
correct tokens, as far as a budget of slots allows, and one of these branches is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.drafting import Drafter, StudentDrafter, draft_windows
from ptp_lightning.decoding.generation import Decoded, GenerationSettings, OnTokens
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.slot_allocation import CorrectLengths, allocate_slots
from ptp_lightning.decoding.state import begin_decoding, take_columns
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.models.network import PredictorNetwork


def require_slots_in_calls(predictor: PredictorNetwork) -> None:
    """Refuse slots that run through the last layers alone: they wait for the token before, which this call picks.

    Raises:
        ValueError: names the decoder to use.
    """
    if predictor.first_slot_layer:
        raise ValueError(
            "expected slots in all layers for partial quadratic decoding, found an adapter with predictor.slot_layers "
            f"{predictor.config.slot_layers}: set decoder to speculative"
        )


@torch.inference_mode()
def decode_partially_quadratically(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    drafter: Drafter | None = None,
    lengths: CorrectLengths | None = None,
    timer: PhaseTimer | None = None,
) -> list[Decoded]:
    """Calls that each commit `correct + 1` tokens: the correct part of the draft, and the base model's pick after it.

    A call reads the newest token, the draft that follows it, and slots in branches (see `Lookahead`): branch k
    continues the text after k correct tokens. The base model's logits at the newest token and at the drafted tokens
    give the picks, which are exact. With k correct tokens the pick after them is committed too. The slots of branch k
    stand for that pick and the tokens after it; they give the draft of the next call.

    Args:
        predictor: its base model verifies what its student drafts.
        prompts: B lists of token ids, decoded side by side; each text is the same as if it were decoded alone.
        settings: a branch has at most `window_length - 1` slots, a call `slot_budget`.
        on_tokens: is called once a call with the committed tokens of each text.
        drafter: makes the drafts; by default the student.
        lengths: distribution of the number of correct tokens of a draft. It decides how slots are divided among
            branches and never changes the text. By default it comes from the predictor's validation.
        timer: marks the ends of phases.

    Raises:
        ValueError: a prompt is empty, or too long for `max_new_tokens` more, or slots run through the last layers
            alone.
    """
    require_slots_in_calls(predictor)
    max_slots = settings.window_length - 1
    if lengths is None:
        lengths = CorrectLengths.from_validation(predictor.prefix_counts, max_slots)
    lengths = lengths.truncated(max_slots)
    with begin_decoding(predictor, prompts, settings, on_tokens, timer) as (context, texts, known, counts):
        if drafter is None:
            drafter = StudentDrafter(predictor.config.objective, context.sampling)
        drafts = known[:, :0]
        draft_lengths = [0] * len(prompts)
        while texts.rows:
            starts, calls_before = texts.starts, context.num_calls
            branches = [
                _branches(lengths, length, remaining, settings.slot_budget)
                for length, remaining in zip(draft_lengths, texts.remaining, strict=True)
            ]

            # Verify the draft and look ahead of each of its tokens.
            _, slots = context.read(
                torch.cat([known, drafts], dim=1), Lookahead.branches(counts, branches, context.device)
            )
            context.timer.mark("forward")
            logits = context.next_logits([count - 1 for count in counts], drafts.shape[1] + 1)
            distribution = context.sampling.distribution(logits)
            picks = pick(context.auxiliaries(starts, drafts.shape[1] + 1), distribution)
            is_draft = torch.arange(drafts.shape[1]) < torch.tensor(draft_lengths).unsqueeze(1)
            is_correct = (drafts == picks[:, :-1]) & is_draft.to(context.device)
            correct = is_correct.cumprod(dim=1).sum(dim=1, keepdim=True)

            # Commit. Here the call waits for the device.
            found = torch.cat([correct, picks, drafts], dim=1).tolist()
            context.timer.mark("verifying")
            start = drafts.shape[1] + 2  # of the draft in a row
            num_correct = [row[0] for row in found]
            context.keep([count + k for count, k in zip(counts, num_correct, strict=True)])
            known = picks.gather(1, correct)
            texts.commit(
                [row[1 : row[0] + 2] for row in found],
                context.num_calls - calls_before,
                [k + 1 for k in num_correct],
                [length + 1 for length in draft_lengths],
                [row[start + row[0] : start + length] for row, length in zip(found, draft_lengths, strict=True)],
            )

            # Draft from the branch after the correct tokens.
            first_slots = [sum(row[:k]) for row, k in zip(branches, num_correct, strict=True)]
            draft_lengths = [row[k] for row, k in zip(branches, num_correct, strict=True)]
            unfinished = texts.drop_finished()
            if unfinished:
                context.select(unfinished)
                known, slots = known[unfinished], slots[unfinished]
                first_slots, draft_lengths = ([old[k] for k in unfinished] for old in (first_slots, draft_lengths))
            context.timer.mark("bookkeeping")
            if texts.rows:
                counts = [1] * len(texts.rows)
                branch = take_columns(slots, first_slots, max(draft_lengths))
                drafts = draft_windows(context, drafter, known, branch, [start - 1 for start in texts.starts])[:, 1:]
                context.timer.mark("drafting")
    return texts.decoded()


def _branches(lengths: CorrectLengths, draft_length: int, remaining: int, budget: int) -> list[int]:
    """Number of slots of each branch, fewer near the end of the text.

    After k + 1 tokens of this call and the last pick of the next call, `remaining - k - 2` tokens are left to draft.
    """
    slots = allocate_slots(lengths, draft_length, budget)
    return [min(num_slots, max(0, remaining - k - 2)) for k, num_slots in enumerate(slots)]
