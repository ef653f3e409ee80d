"""The reference decoder: the base model alone, one token per call, driven by u."""

from __future__ import annotations

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


@torch.inference_mode()
def decode_autoregressively(
    predictor: ParallelTokenPredictor,
    prompt_ids: Tensor,
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
) -> Decoded:
    """Sample t_k = Pick(u_k, Q_k), Q_k the base model's distribution given everything before.

    Args:
        predictor: in eval mode; its adapter and slot encoder take no part.
        prompt_ids: `[1, S]` int64, S >= 1, on the predictor's device.
        settings: `window_length` has no meaning here.
        on_tokens: is called with each new token.

    Raises:
        ValueError: the prompt is empty, or too long for `max_new_tokens` more.
    """
    require_room(predictor, prompt_ids.shape[1], settings)
    auxiliaries = settings.auxiliaries(prompt_ids.device)
    context = CachedContext(predictor, settings.sampling)
    output = VerifiedOutput(settings, on_tokens)
    newest = prompt_ids
    while output.finished is None:
        k = len(output.token_ids)
        hidden = context.read(newest)[:, -1:]
        newest = pick(auxiliaries[:, k : k + 1], context.sampling.distribution(predictor.logits(hidden)))
        output.commit(newest[0].tolist())
    return Decoded(output.token_ids, context.num_calls, output.finished, correct_per_cycle=[])
