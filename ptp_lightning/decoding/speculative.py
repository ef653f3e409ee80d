"""Speculative decoding: the student drafts a window, the base model verifies it (Draxler et al., ICLR 2026, Alg. 1).

The committed text is the text of the reference decoder for the same auxiliaries, token for token, whatever the drafts
are. Drafts only decide how many calls it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.drafting import (
    Drafter,
    StudentDrafter,
    TreeDrafter,
    draft_trees,
    draft_windows,
    num_tree_tokens,
)
from ptp_lightning.decoding.generation import Decoded, GenerationSettings, OnTokens
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.state import begin_decoding
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.decoding.token_tree import TokenTree, verified_paths
from ptp_lightning.models.network import PredictorNetwork


@torch.inference_mode()
def decode_speculatively(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    drafter: Drafter | None = None,
    timer: PhaseTimer | None = None,
) -> list[Decoded]:
    """Cycles of two calls (three with a student's copy) that commit `accepted = correct + 1` tokens.

    1. Draft. A call reads the tokens that the cache lacks (first the prompt or its last token, later the newest token),
       then slots. The base model's logits give the first token of the window, t_1 = Pick(u_1, Q_1); slot j gives token
       j + 2. A student's copy has a call of its own for the slots, in which it also reads what was committed since its
       last.
       There may be several drafts, which share their beginnings (see `TokenTree`).
    2. Verify. A call reads the drafts with the gate closed. The longest path of tokens that are the base model's own
       picks is correct (1 .. L tokens, since t_1 always is). It is committed together with the base model's pick after
       it: the correction of a wrong token, or a bonus after the last.

    The draft leaves room for that last pick, so windows shrink towards the end of the longest text. If a single token
    remains, it is t_1 of a drafting call and needs no verification.

    Args:
        predictor: its base model verifies what its student drafts.
        prompts: B lists of token ids, decoded side by side; each text is the same as if it were decoded alone.
        settings: sampling settings other than the predictor's own cost correct tokens, not exactness.
        on_tokens: is called once a cycle with the committed tokens of each text.
        drafter: makes the drafts; by default the student. Trees need a `TreeDrafter`.
        timer: marks the ends of phases.

    Raises:
        ValueError: a prompt is empty, or too long for `max_new_tokens` more.
    """
    with begin_decoding(predictor, prompts, settings, on_tokens, timer) as (context, texts, unread, counts):
        if drafter is None:
            drafter = StudentDrafter(predictor.config.objective, context.sampling)
        tree_size = num_tree_tokens(predictor, settings)
        while texts.rows:
            starts, calls_before = texts.starts, context.num_calls
            length = max(1, min(settings.window_length, max(texts.remaining) - 1))

            # Draft.
            _, slots = context.read(unread, Lookahead.single(counts, length - 1, context.device))
            context.timer.mark("forward")
            logits = context.next_logits([count - 1 for count in counts], 1)
            context.keep(counts)
            first = pick(context.auxiliaries(starts, 1), context.sampling.distribution(logits))
            if max(texts.remaining) == 1:
                single = [1] * len(starts)
                texts.commit(first.tolist(), context.num_calls - calls_before, correct=single, drafted=single)
                break
            if tree_size and isinstance(drafter, TreeDrafter):
                tree = draft_trees(context, drafter, first, slots, starts, tree_size)
            else:
                tree = TokenTree.chain(draft_windows(context, drafter, first, slots, starts))
            context.timer.mark("drafting")

            # Verify. A column of the picks is the base model's token after that column of the tree. Here the cycle
            # waits for the device.
            context.read_tree(tree)
            context.timer.mark("forward")
            num_tokens = tree.token_ids.shape[1]
            distribution = context.sampling.distribution(context.next_logits([0] * len(starts), num_tokens))
            auxiliaries = context.auxiliaries([start + 1 for start in starts], length).gather(1, tree.depths)
            verified, after = verified_paths(tree, pick(auxiliaries, distribution))
            context.timer.mark("verifying")

            # Commit the longest correct path and the base model's token after it.
            context.keep_path(verified.columns)
            texts.commit(
                verified.token_ids,
                context.num_calls - calls_before,
                [len(path) for path in verified.columns],
                [length] * len(starts),
                verified.rejected,
            )
            unread = after
            unfinished = texts.drop_finished()
            if unfinished:
                context.select(unfinished)
                unread = unread[unfinished]
            counts = [1] * len(texts.rows)
            context.timer.mark("bookkeeping")
    return texts.decoded()
