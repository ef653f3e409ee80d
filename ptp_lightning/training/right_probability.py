"""The probability that a slot proposes its reference token, measured while the loss holds the slot's logits."""

import torch
from torch import Tensor

from ptp_lightning.losses import SlotMeasure
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.sampling import Sampler, TokenDistribution
from ptp_lightning.training.windows import WindowSample


def right_probability(
    predictor: ParallelTokenPredictor, sample: WindowSample, positions: slice, sampling: Sampler
) -> SlotMeasure:
    """What `AcceptedLengthWeights` reads: `Objective.right_probability` of slots.

    Args:
        predictor: what its objective proposes.
        sample: the windows, whose teacher drew the tokens.
        positions: those of each window that the slots predict, J of them.
        sampling: settings of the windows.

    Returns:
        A measure of slots that are numbered through `[B, N, J]`.
    """
    objective = predictor.config.objective
    # Views: teacher distributions over a whole vocabulary are not copied for all slots at once.
    tokens = sample.token_ids[..., positions]
    probabilities = sample.teacher.probabilities[..., positions, :]
    token_ids = None if sample.teacher.token_ids is None else sample.teacher.token_ids[..., positions, :]

    def measure(logits: Tensor, slots: Tensor) -> Tensor:
        index = torch.unravel_index(slots, tokens.shape)
        teacher = TokenDistribution(probabilities[index], None if token_ids is None else token_ids[index])
        return objective.right_probability(logits, tokens[index], teacher, sampling)

    return measure
