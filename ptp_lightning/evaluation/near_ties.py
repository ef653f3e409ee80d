"""Near-ties: whether rounding explains why a text departs from the reference.

Calls of other shapes may round their logits otherwise, and where u lies next to the border of two tokens, that decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.state import begin
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import Sampler

NUM_RANDOM_CHANGES = 256
NUM_STEPS = 2  # of the dtype, by which logits of calls of other shapes may always differ
SMALLEST_ROUNDING = 1e-4  # of float32 logits, whose sums over layers differ by more than a step
SPREAD_FACTOR = 2.0  # by how much more than calls that were tried others may differ


@dataclass(frozen=True)
class Deviation:
    """Where an answer departs from the autoregressive decoder's.

    Attributes:
        contender: whose answer it is.
        question_id: of the question.
        turn: of it.
        seed: of the auxiliaries.
        temperature: of the sampling.
        place: number of the first token that differs.
        near_tie: rounding explains it.
    """

    contender: str
    question_id: str
    turn: int
    seed: int
    temperature: float
    place: int
    near_tie: bool


def first_difference(text: Sequence[int], reference: Sequence[int]) -> int | None:
    """Place of the first token in which two texts differ; None if they are the same."""
    if list(text) == list(reference):
        return None
    pairs = zip(text, reference, strict=False)
    return next((place for place, (own, other) in enumerate(pairs) if own != other), min(len(text), len(reference)))


@torch.inference_mode()
def explains(
    predictor: PredictorNetwork,
    prompt: Sequence[int],
    reference: Sequence[int],
    place: int,
    token_id: int,
    settings: GenerationSettings,
) -> bool:
    """Whether rounding explains that `token_id` stands at `place`, instead of the reference's token."""
    token_ids = [*prompt, *reference[:place]]
    shapes = ((0, 0), (len(token_ids) - 1, 0), (0, settings.window_length - 1))
    logits, *others = (_logits(predictor, token_ids, settings, *shape) for shape in shapes)
    rounding = max(
        NUM_STEPS * torch.finfo(logits.dtype).eps * float(logits.abs().max()),
        SPREAD_FACTOR * max(float((other - logits).abs().max()) for other in others),
        SMALLEST_ROUNDING,
    )
    u = settings.auxiliaries(1, logits.device)[0, place]
    return is_near_tie(logits, u, token_id, predictor.sampler(settings.sampling), rounding)


def _logits(
    predictor: PredictorNetwork,
    token_ids: Sequence[int],
    settings: GenerationSettings,
    num_read_before: int,
    num_fillers: int,
) -> Tensor:
    """`[V]`, what follows the tokens; some are read in a call before, and fillers stand behind the last."""
    context, _, _, _ = begin(predictor, [token_ids], replace(settings, max_new_tokens=1), None, None)
    tokens = torch.tensor([[*token_ids, *[token_ids[-1]] * num_fillers]], device=context.device)
    if num_read_before:
        context.read(tokens[:, :num_read_before])
        context.keep([num_read_before])
    hidden, _ = context.read(tokens[:, num_read_before:])
    return context.logits(hidden[0, len(token_ids) - 1 - num_read_before])


def is_near_tie(logits: Tensor, u: Tensor, token_id: int, sampling: Sampler, rounding: float) -> bool:
    """Whether changing no logit by more than `rounding` can make u pick a token.

    It is tried out, with changes that move the token's interval or the cut of top-k and top-p as far as possible, and
    with random ones; so "no" may be wrong, "yes" is not.

    Args:
        logits: `[V]`.
        u: scalar, the auxiliary.
        token_id: the token.
        sampling: settings and order.
        rounding: the largest change.
    """
    vocabulary = logits.shape[-1]
    device = logits.device
    logits = logits.float()
    rank = logits.argsort(descending=True).argsort()
    places = torch.arange(vocabulary, device=device) if sampling.token_ranks is None else sampling.token_ranks
    tilts = [
        torch.where(by <= by[token_id] + shift, 1.0, -1.0) * sign
        for by in (places, rank)
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
