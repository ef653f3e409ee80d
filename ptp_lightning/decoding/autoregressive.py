"""The reference decoder: the base model alone, one token per call, driven by u."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.generation import Decoded, GenerationSettings, OnTokens
from ptp_lightning.decoding.state import begin, columns_from
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
    """Sample t_k = Pick(u_k, Q_k), Q_k the base model's distribution given everything before.

    Args:
        predictor: in eval mode; its adapter and slot encoder take no part.
        prompts: B lists of token ids.
        settings: `window_length` has no meaning here.
        on_tokens: is called with each new token.
        timer: is told when a phase ends.

    Raises:
        ValueError: a prompt is empty, or too long for `max_new_tokens` more.
    """
    context, texts, unread, counts = begin(predictor, prompts, settings, on_tokens, timer)
    while texts.rows:
        hidden, _ = context.read(unread)
        context.keep(counts)
        context.timer.mark("forward")
        last = columns_from(hidden, [count - 1 for count in counts], 1)
        unread = pick(context.auxiliaries(texts.starts, 1), context.sampling.distribution(context.logits(last)))
        picks = unread.tolist()
        context.timer.mark("verifying")
        texts.commit(picks, num_calls=1)
        staying = texts.drop_finished()
        if staying:
            context.select(staying)
            unread = unread[staying]
        counts = [1] * len(texts.rows)
        context.timer.mark("bookkeeping")
    return texts.decoded()
