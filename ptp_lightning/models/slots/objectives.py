"""Objectives: which auxiliaries a slot carries, and how its logits give a token (Theorems 1 and 2 of the paper)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ptp_lightning.auxiliary import likely_pick, likely_picks, token_interval
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution

LISTED_TOKENS = 50
"""Tokens among which probabilities of the most likely ones are divided."""


@dataclass(frozen=True)
class Objective(ABC):
    """Which auxiliaries a slot carries, and how its logits give a token."""

    name: ClassVar[str]
    num_inputs: ClassVar[int]
    conditions_on_draft: ClassVar[bool] = True
    """Whether a correction is conditioned on the drafted tokens at the slots' positions."""
    predicts_distribution: ClassVar[bool] = True
    """Whether logits are a distribution of the next token, to be compared with a target distribution."""

    @abstractmethod
    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """Split `[..., L]` into the `num_inputs` auxiliaries of each of the L - 1 slots, `[..., L - 1]` each."""

    @abstractmethod
    def tokens_from_logits(self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler) -> Tensor:
        """Tokens `[...]` from logits of slots and the auxiliaries `[...]` of the predicted tokens.

        Args:
            logits: `[..., N]`, N = V without a draft vocabulary.
            auxiliaries: `[...]` float64.
            sampling: of the windows; knows the draft vocabulary.
        """

    def likely_tokens(
        self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler, count: int
    ) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, of which the first is that of `tokens_from_logits`, and their probabilities.

        By default there are no alternatives: this token alone, with probability 1.

        Args:
            logits: see `tokens_from_logits`.
            auxiliaries: likewise.
            sampling: likewise.
            count: C, number of tokens; there may be fewer.

        Returns:
            Two tensors `[..., C]`.
        """
        token_ids = self.tokens_from_logits(logits, auxiliaries, sampling).unsqueeze(-1)
        return token_ids, torch.ones_like(token_ids, dtype=torch.float64)

    @abstractmethod
    def correct_probability(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution, sampling: Sampler
    ) -> Tensor:
        """The probability that a slot drafts the reference token: `[...]`, float32 or better, without gradient.

        Args:
            logits: `[..., N]`, N = V without a draft vocabulary.
            token_ids: `[...]`, the reference tokens.
            teacher: distributions `[..., K]` that the tokens were picked from.
            sampling: of the windows.
        """


@dataclass(frozen=True)
class OneHotObjective(Objective):
    """O-PTP (Theorem 1): a slot carries the u of its own position and of the token it predicts; drafts its argmax.

    >>> OneHotObjective().inputs(torch.tensor([0.1, 0.2, 0.3]))  # a window of three tokens has two slots
    [tensor([0.1000, 0.2000]), tensor([0.2000, 0.3000])]
    """

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
        token_ids = (
            replace(sampling.for_student(), settings=SamplingConfig(temperature=0)).distribution(logits).token_ids
        )
        assert token_ids is not None, "greedy distributions list their one token"
        return token_ids.squeeze(-1)

    def likely_tokens(
        self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler, count: int
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.likely_tokens`."""
        return _most_likely(logits, sampling, count)

    @torch.no_grad()
    def correct_probability(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution, sampling: Sampler
    ) -> Tensor:
        """The student's probability of the reference token; `teacher` and sampling settings are not read."""
        prediction = replace(sampling.for_student(), settings=SamplingConfig()).distribution(logits)
        return prediction.probability_of(token_ids)


@dataclass(frozen=True)
class PickingObjective(Objective):
    """A slot predicts a distribution, and u picks the drafted token from it.

    Args:
        cdf_error: assumed error of the predicted cumulative distribution (see `likely_pick`). It affects drafts, not
            training; 0 is the paper's `Pick(u_k, P_k)`.

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

    def likely_tokens(
        self, logits: Tensor, auxiliaries: Tensor, sampling: Sampler, count: int
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.likely_tokens`; a single token for a `cdf_error` of 0."""
        if sampling.settings.temperature == 0:
            return _most_likely(logits, sampling, count)
        if self.cdf_error == 0:
            return super().likely_tokens(logits, auxiliaries, sampling, count)
        return likely_picks(auxiliaries, sampling.for_student().distribution(logits), self.cdf_error, count)

    def correct_probability(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution, sampling: Sampler
    ) -> Tensor:
        """See `interval_overlap`; assumes `cdf_error` 0."""
        return interval_overlap(sampling.for_student().distribution(logits.detach()), teacher, token_ids)


@dataclass(frozen=True)
class CategoricalObjective(PickingObjective):
    """C-PTP (Theorem 2): a slot carries the u of its own position; drafts Pick(u_k, P_k) for the token it predicts.

    >>> CategoricalObjective().inputs(torch.tensor([0.1, 0.2, 0.3]))
    [tensor([0.1000, 0.2000])]
    """

    name: ClassVar[str] = "categorical"
    num_inputs: ClassVar[int] = 1

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """u_{i+j}."""
        return [auxiliaries[..., :-1]]


@dataclass(frozen=True)
class IndependentObjective(PickingObjective):
    """MTP, the baseline: a slot carries nothing, so it can only learn marginals; drafts with the same u as C-PTP."""

    name: ClassVar[str] = "independent"
    num_inputs: ClassVar[int] = 0
    conditions_on_draft: ClassVar[bool] = False

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """Nothing."""
        return []


@dataclass(frozen=True)
class SequentialObjective(IndependentObjective):
    """Slots that carry nothing, as in MTP, with a correction that is conditioned on the draft, as in Hydra heads.

    u is used only to pick drafted tokens. The difference to PTP measures the benefit of auxiliaries in slots.
    """

    name: ClassVar[str] = "sequential"
    conditions_on_draft: ClassVar[bool] = True


def _most_likely(logits: Tensor, sampling: Sampler, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens `[..., count]` at temperature 1, and their probabilities."""
    settings = SamplingConfig(temperature=1.0, top_k=LISTED_TOKENS, order="descending")
    listed = replace(sampling.for_student(), settings=settings).distribution(logits)
    assert listed.token_ids is not None, "a descending order lists its tokens"
    return listed.token_ids[..., :count], listed.probabilities[..., :count]


@torch.no_grad()
def interval_overlap(P: TokenDistribution, Q: TokenDistribution, token_ids: Tensor) -> Tensor:
    """Probability of `Pick(u, P) == t` for u uniform given `Pick(u, Q) == t`: `|I_P(t) & I_Q(t)| / |I_Q(t)|`.

    Args:
        P: distributions `[..., K]` of the student.
        Q: distributions `[..., K']` of the teacher.
        token_ids: t, `[...]`.

    Returns:
        `[...]` float64; 0 for a token that no u picks from Q.

    >>> P, Q = TokenDistribution(torch.tensor([[0.5, 0.5]])), TokenDistribution(torch.tensor([[0.25, 0.75]]))
    >>> interval_overlap(P, Q, torch.tensor([1]))  # [0.5, 1) covers two thirds of [0.25, 1)
    tensor([0.6667], dtype=torch.float64)
    """
    (lower_P, upper_P), (lower_Q, upper_Q) = token_interval(P, token_ids), token_interval(Q, token_ids)
    shared = (torch.minimum(upper_P, upper_Q) - torch.maximum(lower_P, lower_Q)).clamp_min(0)
    width = upper_Q - lower_Q
    return torch.where(width > 0, shared / width, 0.0)
