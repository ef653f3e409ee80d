"""The probability that a slot drafts its reference token, measured while the loss holds the slot's logits."""

import torch
from torch import Tensor

from ptp_lightning.losses import SlotMeasure
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import Sampler
from ptp_lightning.training.windows.window_source import SLOT_POSITIONS, WindowSample


def correct_probability(predictor: PredictorNetwork, sample: WindowSample, sampling: Sampler) -> SlotMeasure:
    """`Objective.correct_probability` of slots, for `AcceptedLengthWeights`.

    Args:
        predictor: its objective turns logits into drafts.
        sample: the windows; its teacher picked the tokens.
        sampling: settings of the windows.

    Returns:
        A measure of slots, which are numbered in the order of `[B, N, L - 1]`.
    """
    objective = predictor.config.objective
    tokens, teachers = sample.token_ids[..., 1:], sample.teacher.at(SLOT_POSITIONS)

    def measure(logits: Tensor, slots: Tensor) -> Tensor:
        index = torch.unravel_index(slots, tokens.shape)
        return objective.correct_probability(logits, tokens[index], teachers.at(index).materialize(), sampling)

    return measure
