"""Several drafts for one context, and how one may be chosen (section 3 of the paper).

M independent draws of u give M drafts; one of them is verified and committed. The choice decides whether the text is
still a sample of the teacher. Write `u_k = lower + r_k (upper - lower)` with the interval of the token that u_k picks.
The relative positions r of a window are uniform on [0, 1)^L for every token sequence, so a choice that depends on r
alone is independent of the tokens. A choice that depends on tokens is biased: the number of correct tokens (favours
texts that the student predicts easily), probabilities, interval widths, or r at a number of positions that depends on
the tokens or on the student's first error. **All L positions must count**, also after an error or an end of text.

It also matters whose intervals are used:

* Those of the teacher's own text for u: r is independent of the whole text, and the chosen u may be used to its end.
* Those of the student's text, which one verifying call computes: up to the first error they are the same. After it the
  intervals belong to another text, and a u_k in the middle of one of them is no longer uniform for the teacher's text.
  The committed tokens (the correct tokens and the teacher's correction) are unbiased; later tokens need fresh u.
"""

import torch
from torch import Tensor

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.windows.student_windows import StudentWindows


def relative_positions(auxiliaries: Tensor, P: TokenDistribution, token_ids: Tensor) -> Tensor:
    """Positions of auxiliaries `[...]` in the intervals of the tokens `[...]` they pick: `[...]` float64 in [0, 1].

    >>> P = TokenDistribution(torch.tensor([[0.5, 0.25, 0.25]]))
    >>> relative_positions(torch.tensor([0.625]), P, torch.tensor([1]))  # in [0.5, 0.75)
    tensor([0.5000], dtype=torch.float64)
    """
    lower, upper = token_interval(P, token_ids)
    return (auxiliaries.double() - lower) / (upper - lower)


def distance_from_centres(relative: Tensor) -> Tensor:
    """Mean of `|r_k - 1/2|`: relative positions `[..., L]` to `[...]`; the draft with the smallest mean is chosen."""
    return (relative - 0.5).abs().mean(-1)


@torch.no_grad()
def best_of(
    num_drafts: int, predictor: PredictorNetwork, context: Context, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draft every window M times and choose the draft whose auxiliaries lie closest to the centres of their intervals.

    The intervals are those that one verifying call computes, along the student's text. Drafts are made one after the
    other, so that memory does not grow with M.

    Returns:
        Of the chosen drafts, `[B, N, L]` bool each: which tokens the teacher picks after the tokens before them, and
        the mask that ends with the text.
    """
    best_distance, best_correct, best_mask = _measured_draft(predictor, context, generator)
    for _ in range(num_drafts - 1):
        distance, correct, mask = _measured_draft(predictor, context, generator)
        closer = distance < best_distance
        best_distance = distance.where(closer, best_distance)
        best_correct = correct.where(closer, best_correct)
        best_mask = mask.where(closer, best_mask)
    return best_correct, best_mask


def _measured_draft(
    predictor: PredictorNetwork, context: Context, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One draft of every window: its distance `[B, N, 1]` from the centres, which tokens are correct, and the mask."""
    sample = StudentWindows().sample(predictor, context, generator)
    relative = relative_positions(sample.auxiliaries, sample.teacher.materialize(), sample.token_ids)
    distance = distance_from_centres(relative).unsqueeze(-1)
    return distance, sample.conditioning_ids == sample.token_ids, sample.mask
