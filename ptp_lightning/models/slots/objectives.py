"""Objectives: which auxiliaries a slot carries, and how its logits become a token (Theorems 1 and 2 of the paper)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptp_lightning.auxiliary import likely_pick, token_interval
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution


@dataclass(frozen=True)
class Objective(ABC):
    """Which auxiliaries a slot carries, and how its logits become a token."""

    name: ClassVar[str]
    num_inputs: ClassVar[int]
    conditions_on_draft: ClassVar[bool] = True
    """Whether the refiner, where there is one, is told the proposed tokens that the slots stand for."""
    predicts_distribution: ClassVar[bool] = True
    """Whether logits stand for the distribution of the next token, to be compared with the teacher's."""

    @abstractmethod
    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """Split `[..., L]` into the `num_inputs` auxiliaries of each of the L - 1 slots, `[..., L - 1]` each."""

    @abstractmethod
    def tokens_from_logits(self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler) -> Tensor:
        """Tokens `[...]` from logits `[..., V]` and the auxiliaries `[...]` of the predicted tokens."""

    @abstractmethod
    def correct_probability(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution, sampling: Sampler
    ) -> Tensor:
        """How likely a slot proposes the reference token: `[...]`, float32 or better, without gradient.

        Args:
            logits: `[..., V]`.
            token_ids: `[...]`, the reference tokens.
            teacher: distributions `[..., K]` they were picked from.
            sampling: of the windows.
        """


@dataclass(frozen=True)
class OneHotObjective(Objective):
    """O-PTP (Theorem 1): a slot carries the u of its own place and of the token it predicts; proposes its argmax."""

    name: ClassVar[str] = "one_hot"
    num_inputs: ClassVar[int] = 2
    predicts_distribution: ClassVar[bool] = False

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """u_{i+j} and u_{i+j+1}."""
        return [auxiliaries[..., :-1], auxiliaries[..., 1:]]

    def tokens_from_logits(self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler) -> Tensor:
        """The most likely token.

        Raises:
            ValueError: a NaN or infinity among the logits.
        """
        token_ids = SamplingConfig(temperature=0).distribution(logits).token_ids
        assert token_ids is not None, "greedy distributions list their one token"
        return token_ids.squeeze(-1)

    @torch.no_grad()
    def correct_probability(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution, sampling: Sampler
    ) -> Tensor:
        """The probability that the student gives to the reference token; `teacher` and `sampling` are not read."""
        return SamplingConfig().distribution(logits).probability_of(token_ids)


@dataclass(frozen=True)
class PickingObjective(Objective):
    """A slot predicts a distribution, and the proposal is what u picks from it.

    Args:
        cdf_error: how far the predicted cumulative distribution is taken to be off (see `likely_pick`). Proposals alone
            depend on it, not what is learned; 0 is the paper's `Pick(u_k, P_k)`.

    Raises:
        ValueError: the error is negative.
    """

    cdf_error: float = 0.0

    def __post_init__(self) -> None:
        if not self.cdf_error >= 0:
            raise ValueError(f"expected predictor.objective.init_args.cdf_error >= 0, found {self.cdf_error}")

    def tokens_from_logits(self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler) -> Tensor:
        """Inverse CDF of the predicted distribution at the predicted token's u."""
        return likely_pick(auxiliaries, sampling.for_student().distribution(logits), self.cdf_error)

    def correct_probability(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution, sampling: Sampler
    ) -> Tensor:
        """See `interval_overlap`; as if `cdf_error` were 0."""
        return interval_overlap(sampling.for_student().distribution(logits.detach()), teacher, token_ids)


@dataclass(frozen=True)
class CategoricalObjective(PickingObjective):
    """C-PTP (Theorem 2): a slot carries the u of its own place; proposes Pick(u_k, P_k) for the token it predicts."""

    name: ClassVar[str] = "categorical"
    num_inputs: ClassVar[int] = 1

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """u_{i+j}."""
        return [auxiliaries[..., :-1]]


@dataclass(frozen=True)
class IndependentObjective(PickingObjective):
    """MTP, the baseline: a slot carries nothing, so it can only learn marginals; scored like C-PTP with the same u."""

    name: ClassVar[str] = "independent"
    num_inputs: ClassVar[int] = 0
    conditions_on_draft: ClassVar[bool] = False

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """Nothing."""
        return []


@dataclass(frozen=True)
class SequentialObjective(IndependentObjective):
    """Slots that carry nothing, like MTP's, before a refiner that is told the draft, as in Hydra heads.

    It draws on u only where a token is proposed. What PTP gains over it is what its slots make of their auxiliaries.
    """

    name: ClassVar[str] = "sequential"
    conditions_on_draft: ClassVar[bool] = True


@torch.no_grad()
def interval_overlap(P: TokenDistribution, Q: TokenDistribution, token_ids: Tensor) -> Tensor:
    """Chance that `Pick(u, P) == t` for u uniform among those with `Pick(u, Q) == t`: `|I_P(t) & I_Q(t)| / |I_Q(t)|`.

    Args:
        P: distributions `[..., K]`, of the proposal.
        Q: distributions `[..., K']`, of the teacher.
        token_ids: t, `[...]`.

    Returns:
        `[...]` float64; 0 for a token that no u picks from Q.
    """
    (lower_P, upper_P), (lower_Q, upper_Q) = token_interval(P, token_ids), token_interval(Q, token_ids)
    shared = (torch.minimum(upper_P, upper_Q) - torch.maximum(lower_P, lower_Q)).clamp_min(0)
    width = upper_Q - lower_Q
    return torch.where(width > 0, shared / width, 0.0)
