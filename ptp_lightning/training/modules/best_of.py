"""Several proposals for one context, and which of them may be kept (section 3 of the paper).

M independent draws of u give M proposals; one is verified and committed. Whether that is still a sample of the teacher
depends on how it is chosen. Write u_k = lower + r_k (upper - lower) with the interval of the token that u_k picks. Then
the relative positions r of a window are uniform on [0, 1)^L whatever its tokens are, so a choice by r tells nothing
about tokens, while a choice by anything that tokens have a part in does: the number of correct tokens (texts that the
student finds easy win), probabilities, widths of intervals, or r at a number of positions that depends on the tokens or
on how far the student came. So **all L positions count**, also behind an error or an end of text. It must also be known
whose intervals they are:

* of the teacher's own text for u: r is independent of that whole text, and every chosen u may be used to its end;
* of the student's text, which is what one verifying call knows: up to the first error both are the same; behind it the
  intervals belong to another text, and a u_k in the middle of one of them is no longer uniform for the true text. What
  is committed, the correct tokens and the teacher's correction, is unbiased. What follows must be drawn with fresh u.
"""

import torch
from torch import Tensor

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.windows.student_windows import StudentWindows


def relative_positions(auxiliaries: Tensor, P: TokenDistribution, token_ids: Tensor) -> Tensor:
    """Where auxiliaries `[...]` lie in the intervals of the tokens `[...]` they pick: `[...]` float64 in [0, 1]."""
    lower, upper = token_interval(P, token_ids)
    return (auxiliaries.double() - lower) / (upper - lower)


def distance_from_centres(relative: Tensor) -> Tensor:
    """Mean of `|r_k - 1/2|`: relative positions `[..., L]` to `[...]`; the proposal with the smallest is chosen."""
    return (relative - 0.5).abs().mean(-1)


@torch.no_grad()
def best_of(
    num_proposals: int, predictor: PredictorNetwork, context: Context, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Propose every window M times and keep the proposal whose u lie closest to the centres of their intervals.

    The intervals are those that one verifying call knows, along the student's text. Proposals are made one after the
    other, so that memory does not grow with M.

    Returns:
        Of the chosen proposals, `[B, N, L]` bool each: which tokens are the teacher's picks after the tokens before
        them, and the mask that ends with the text.
    """
    best_distance, best_correct, best_mask = _propose(predictor, context, generator)
    for _ in range(num_proposals - 1):
        distance, correct, mask = _propose(predictor, context, generator)
        closer = distance < best_distance
        best_distance = distance.where(closer, best_distance)
        best_correct = correct.where(closer, best_correct)
        best_mask = mask.where(closer, best_mask)
    return best_correct, best_mask


def _propose(
    predictor: PredictorNetwork, context: Context, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One proposal a window: its distance `[B, N, 1]` from the centres, what is correct, and the mask."""
    sample = StudentWindows().sample(predictor, context, generator)
    distance = distance_from_centres(
        relative_positions(sample.auxiliaries, sample.teacher.materialize(), sample.token_ids)
    )
    return distance.unsqueeze(-1), sample.conditioning_ids == sample.token_ids, sample.mask
