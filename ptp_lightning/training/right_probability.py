"""The probability that a slot proposes its reference token, measured while the loss holds the slot's logits."""

import torch
from torch import Tensor

from ptp_lightning.losses import SlotMeasure
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.sampling import Sampler, TokenDistribution
from ptp_lightning.training.windows import WindowSample


def right_probability(predictor: ParallelTokenPredictor, sample: WindowSample, sampling: Sampler) -> SlotMeasure:
    """What `AcceptedLengthWeights` reads: `Objective.right_probability` of slots.

    Args:
        predictor: what its objective proposes.
        sample: the windows, whose teacher drew the tokens.
        sampling: settings of the windows.

    Returns:
        A measure of slots that are numbered through `[B, N, L - 1]`.
    """
    objective = predictor.config.objective
    # Views: teacher distributions over a whole vocabulary are not copied for all slots at once.
    tokens = sample.token_ids[..., 1:]
    probabilities = sample.teacher.probabilities[..., 1:, :]
    token_ids = None if sample.teacher.token_ids is None else sample.teacher.token_ids[..., 1:, :]

    def measure(logits: Tensor, slots: Tensor) -> Tensor:
        index = torch.unravel_index(slots, tokens.shape)
        teacher = TokenDistribution(probabilities[index], None if token_ids is None else token_ids[index])
        return objective.right_probability(logits, tokens[index], teacher, sampling)

    return measure
