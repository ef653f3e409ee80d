"""Losses over the slots of windows, and how much each position of a window weighs in them."""

from ptp_lightning.losses.base import Head, Loss, LossSum, SlotLosses, SlotMeasure, SlotTargets
from ptp_lightning.losses.divergences import (
    Divergence,
    JensenShannon,
    KullbackLeibler,
    ReverseKullbackLeibler,
    TotalVariation,
)
from ptp_lightning.losses.draft_vocabulary import over_draft_vocabulary
from ptp_lightning.losses.likelihoods import BinaryCrossEntropy, CrossEntropy
from ptp_lightning.losses.mixture import MixedLoss, WeightedLoss
from ptp_lightning.losses.overlap import NegativeLogOverlap
from ptp_lightning.losses.position_weights import (
    AcceptedLengthWeights,
    GeometricWeights,
    PositionWeights,
    UniformWeights,
)
from ptp_lightning.losses.soundness import OBJECTIVES, require_sound

__all__ = [
    "OBJECTIVES",
    "AcceptedLengthWeights",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Divergence",
    "GeometricWeights",
    "Head",
    "JensenShannon",
    "KullbackLeibler",
    "Loss",
    "LossSum",
    "MixedLoss",
    "NegativeLogOverlap",
    "PositionWeights",
    "ReverseKullbackLeibler",
    "SlotLosses",
    "SlotMeasure",
    "SlotTargets",
    "TotalVariation",
    "UniformWeights",
    "WeightedLoss",
    "over_draft_vocabulary",
    "require_sound",
]
