"""One row per loss: its definition in float64 over the whole vocabulary; and targets and logits of a few slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_lightning.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Divergence,
    JensenShannon,
    KullbackLeibler,
    Loss,
    MixedLoss,
    NegativeLogOverlap,
    ReverseKullbackLeibler,
    SlotTargets,
    TotalVariation,
    WeightedLoss,
)
from ptp_lightning.sampling import SamplingConfig, TokenDistribution

M, H, V = 13, 5, 11
FLOOR = 1e-6  # the default of ReverseKullbackLeibler


def cross_entropy(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)


def binary_cross_entropy(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    point = F.one_hot(token_ids, logits.shape[-1]).double()
    return F.binary_cross_entropy_with_logits(logits, point, reduction="none").sum(-1)


def kullback_leibler(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    terms = F.kl_div(logits.log_softmax(-1), target, reduction="none")
    return torch.where(target > 0, terms, 0.0).sum(-1)  # 0 log 0 = 0, also for logits of -inf


def reverse_kullback_leibler(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    student = logits.softmax(-1)
    inside = torch.xlogy(student, student) - torch.xlogy(student, target)
    return torch.where(target > 0, inside, -student * math.log(FLOOR)).sum(-1)


def jensen_shannon(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    student = logits.softmax(-1)
    middle = (student + target) / 2
    terms = torch.xlogy(student, student) + torch.xlogy(target, target) - 2 * torch.xlogy(middle, middle)
    return terms.sum(-1) / 2


def total_variation(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    return (logits.softmax(-1) - target).abs().sum(-1) / 2


def negative_log_overlap(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    return -torch.minimum(logits.softmax(-1), target).sum(-1).log()


def mixture(logits: Tensor, target: Tensor, token_ids: Tensor) -> Tensor:
    return 0.1 * cross_entropy(logits, target, token_ids) + 0.9 * total_variation(logits, target, token_ids)


@dataclass(frozen=True)
class DSparkLoss(MixedLoss):
    """A mixture with terms of its own, for tests that build each loss from its class."""

    needs_target: ClassVar[bool] = True
    sound_for: ClassVar[frozenset[str]] = TotalVariation.sound_for
    unsound_because: ClassVar[Mapping[str, str]] = TotalVariation.unsound_because

    terms: Sequence[WeightedLoss] = (WeightedLoss(CrossEntropy(), 0.1), WeightedLoss(TotalVariation(), 0.9))


Definition = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [M, V], target probabilities [M, V], both float64, and token ids [M] to the loss of each slot [M]."""

DEFINITIONS: dict[type[Loss], Definition] = {
    CrossEntropy: cross_entropy,
    BinaryCrossEntropy: binary_cross_entropy,
    KullbackLeibler: kullback_leibler,
    ReverseKullbackLeibler: reverse_kullback_leibler,
    JensenShannon: jensen_shannon,
    TotalVariation: total_variation,
    NegativeLogOverlap: negative_log_overlap,
    DSparkLoss: mixture,
}
every_loss = pytest.mark.parametrize("loss", list(DEFINITIONS))
every_divergence = pytest.mark.parametrize(
    "loss", [loss for loss in DEFINITIONS if issubclass(loss, Divergence | NegativeLogOverlap)]
)


def identity(hidden: Tensor) -> Tensor:
    """A head for hidden states that are the logits."""
    return hidden


def random_targets(dtype: torch.dtype = torch.float32, config: SamplingConfig | None = None) -> SlotTargets:
    generator = torch.Generator().manual_seed(1)
    config = config or SamplingConfig(temperature=0.7, top_k=6, top_p=0.9)
    target = config.distribution(3 * torch.randn(M, V, generator=generator, dtype=dtype))
    token_ids = torch.randint(V, (M,), generator=generator)
    weights = torch.tensor([1, 1, 0, 1, 0.5, 1, 0, 0, 1, 1, 2, 1, 1], dtype=dtype)
    return SlotTargets(token_ids, target, weights)


def random_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.randn(M, V, generator=torch.Generator().manual_seed(2), dtype=dtype)


def full_probabilities(target: TokenDistribution, vocabulary: int = V) -> Tensor:
    """`[..., V]` float64."""
    if target.token_ids is None:
        return target.probabilities.double()
    zeros = torch.zeros(*target.probabilities.shape[:-1], vocabulary, dtype=torch.float64)
    return zeros.scatter(-1, target.token_ids, target.probabilities.double())


def reference(loss: type[Loss], logits: Tensor, targets: SlotTargets) -> Tensor:
    """The loss of each slot by definition, [M] float64, not weighted."""
    assert targets.target is not None
    return DEFINITIONS[loss](logits.double(), full_probabilities(targets.target, logits.shape[-1]), targets.token_ids)


def one_target(target: TokenDistribution, token_id: int = 0) -> SlotTargets:
    """The same token everywhere, all weights 1."""
    num_slots = len(target.probabilities)
    return SlotTargets(torch.full((num_slots,), token_id), target, torch.ones(num_slots))
