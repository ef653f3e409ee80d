"""Near-ties: whether rounding explains a difference between a text and the reference.

Calls of different shapes may round logits differently. If u is near the boundary of the intervals of two tokens, the
rounding determines the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.exclusive import exclusive
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import Sampler

NUM_RANDOM_CHANGES = 256
NUM_EPSILONS = 2  # of the dtype, by which logits of calls of different shapes may always differ
MIN_ROUNDING = 1e-4  # of float32 logits, in which rounding errors of many layers add up
SAFETY_FACTOR = 2.0  # other calls may differ by more than the measured ones


@dataclass(frozen=True)
class Deviation:
    """The first difference between an answer and that of the autoregressive decoder.

    Attributes:
        decoder: name of the decoder.
        question_id: of the question.
        turn: of the question.
        seed: of the auxiliary variables.
        temperature: of the sampling.
        position: index of the first token that differs.
        near_tie: whether rounding explains it.
    """

    decoder: str
    question_id: str
    turn: int
    seed: int
    temperature: float
    position: int
    near_tie: bool


def first_difference(text: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ; None if they are equal.

    >>> first_difference([5, 6, 7], [5, 8, 7])
    1
    """
    if list(text) == list(reference):
        return None
    pairs = zip(text, reference, strict=False)
    return next((index for index, (own, other) in enumerate(pairs) if own != other), min(len(text), len(reference)))


@torch.inference_mode()
def is_explained_by_rounding(
    predictor: PredictorNetwork,
    prompt: Sequence[int],
    reference: Sequence[int],
    position: int,
    token_id: int,
    settings: GenerationSettings,
) -> bool:
    """Whether rounding explains `token_id` at `position`, instead of the reference's token."""
    token_ids = [*prompt, *reference[:position]]
    shapes = ((0, 0), (len(token_ids) - 1, 0), (0, settings.window_length - 1))
    logits, *others = (_logits(predictor, token_ids, settings, *shape) for shape in shapes)
    rounding = max(
        NUM_EPSILONS * torch.finfo(logits.dtype).eps * float(logits.abs().max()),
        SAFETY_FACTOR * max(float((other - logits).abs().max()) for other in others),
        MIN_ROUNDING,
    )
    u = settings.auxiliaries(1, logits.device)[0, position]
    return is_near_tie(logits, u, token_id, predictor.sampler(settings.sampling), rounding)


def _logits(
    predictor: PredictorNetwork,
    token_ids: Sequence[int],
    settings: GenerationSettings,
    num_read_before: int,
    num_fillers: int,
) -> Tensor:
    """Logits `[V]` after the tokens; a first call reads some of them, and filler tokens follow the last one."""
    with exclusive(predictor), prepare_for_decoding(predictor):
        context = BatchContext(predictor, replace(settings, max_new_tokens=1), [len(token_ids)])
        tokens = torch.tensor([[*token_ids, *[token_ids[-1]] * num_fillers]], device=context.device)
        if num_read_before:
            context.read(tokens[:, :num_read_before])
            context.keep([num_read_before])
        context.read(tokens[:, num_read_before:])
        return context.next_logits([len(token_ids) - 1 - num_read_before], 1)[0, 0]


def is_near_tie(logits: Tensor, u: Tensor, token_id: int, sampling: Sampler, rounding: float) -> bool:
    """Whether u can pick a token after changes of the logits by at most `rounding`.

    The function tries changes that move the token's interval or the thresholds of top-k and top-p as far as possible,
    and random changes. So True is certain, and False is not.

    Args:
        logits: `[V]`.
        u: scalar, the auxiliary variable.
        token_id: the token.
        sampling: settings and token order.
        rounding: largest change of a logit.
    """
    vocabulary = logits.shape[-1]
    device = logits.device
    logits = logits.float()
    probability_rank = logits.argsort(descending=True).argsort()
    cdf_rank = torch.arange(vocabulary, device=device) if sampling.token_ranks is None else sampling.token_ranks
    tilts = [
        torch.where(by <= by[token_id] + shift, 1.0, -1.0) * sign
        for by in (cdf_rank, probability_rank)
        for shift in (-1, 0)
        for sign in (1.0, -1.0)
    ]
    of_token = torch.zeros(vocabulary, device=device)
    of_token[token_id] = 1.0
    tilts += [torch.where(of_token > 0, sign, tilt) for tilt in tilts for sign in (1.0, -1.0)]
    if any(_picks(logits + rounding * tilt, u, token_id, sampling) for tilt in tilts):
        return True
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_RANDOM_CHANGES):
        signs = (torch.randint(0, 2, (vocabulary,), generator=generator) * 2.0 - 1).to(device)
        if _picks(logits + rounding * signs, u, token_id, sampling):
            return True
    return False


def _picks(logits: Tensor, u: Tensor, token_id: int, sampling: Sampler) -> bool:
    return int(pick(u, sampling.distribution(logits))) == token_id
