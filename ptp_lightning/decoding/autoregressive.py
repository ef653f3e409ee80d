"""The reference decoder: the base model alone, one token per call, picked by the auxiliaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.generation import Decoded, GenerationSettings, OnTokens
from ptp_lightning.decoding.state import begin_decoding
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.models.network import PredictorNetwork


@torch.inference_mode()
def decode_autoregressively(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    timer: PhaseTimer | None = None,
) -> list[Decoded]:
    """Sample t_k = Pick(u_k, Q_k), where Q_k is the base model's distribution given all tokens before.

    Args:
        predictor: its adapter and slot encoder are not used.
        prompts: B lists of token ids.
        settings: `window_length` and `slot_budget` are not used.
        on_tokens: is called with each new token.
        timer: marks the ends of phases.

    Raises:
        ValueError: a prompt is empty, or too long for `max_new_tokens` more.
    """
    with begin_decoding(predictor, prompts, settings, on_tokens, timer) as (context, texts, unread, counts):
        while texts.rows:
            context.read(unread)
            context.timer.mark("forward")
            logits = context.next_logits([count - 1 for count in counts], 1)
            context.keep(counts)
            unread = pick(context.auxiliaries(texts.starts, 1), context.sampling.distribution(logits))
            picks = unread.tolist()
            context.timer.mark("verifying")
            texts.commit(picks, num_calls=1)
            unfinished = texts.drop_finished()
            if unfinished:
                context.select(unfinished)
                unread = unread[unfinished]
            counts = [1] * len(texts.rows)
            context.timer.mark("bookkeeping")
    return texts.decoded()
