"""Divergences between a target distribution Q and the student's softmax P.

Every divergence is a sum over tokens of `Q f(P / Q)` with f(1) = 0, f'(1) = 0 and f >= 0. A term like `Q log(Q / P)` is
of first order near equality, takes both signs and shows the rounding errors of P and Q. P and Q both sum to 1, so
`- Q + P` can be added to every term; the result is of second order and never negative. Differences as small as the
rounding errors of two softmaxes count as equality, and there a divergence is exactly 0. In float32 this neglects less
than 1e-10 nats (4e-6 of the total variation, which is of first order).

Q lists K tokens. On tokens that are not listed or were removed (probability 0), a divergence is a constant times the
student's mass there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptp_lightning.losses.base import Loss
from ptp_lightning.sampling import TokenDistribution

# Below this probability a float32 softmax loses digits to underflow, so its logarithm is computed from the logits.
SMALLEST_PROBABILITY = 1e-30

# Two softmaxes of the same row, summed in different orders, may differ by this many units in the last place.
SOFTMAX_ROUNDING_UNITS = 64

# Up to here P / Q - 1 is used instead of P / Q, whose logarithm would lose its digits.
NEARLY_EQUAL = 0.5

IGNORES_U = (
    "a one-hot student is conditioned on u_k, which determines the token t_k: it must learn the point mass on t_k and "
    "not the teacher's distribution Q_k; matching Q_k would teach it to ignore u_k"
)
NOT_THE_MARGINAL = (
    "slots that carry no auxiliaries do not know the tokens before them, so one prediction has to fit many target "
    "distributions Q_k. Only KullbackLeibler is then smallest at their mean, the marginal; {}"
)


class Listed(NamedTuple):
    """Both distributions on the K tokens that the target lists, `[m, K]` each.

    Attributes:
        student: P.
        target: Q; 0 marks a removed token, where the other fields and all terms and slopes are not read.
        excess: P / Q - 1, exactly 0 where it may be rounding.
    """

    student: Tensor
    target: Tensor
    excess: Tensor


@dataclass(frozen=True)
class Divergence(Loss):
    """A sum of `Q f(P / Q)` over tokens, in nats: never negative, exactly 0 where P equals Q; Q gets no gradient.

    Q is the teacher's distribution after temperature and top-k (`SamplingConfig.target`; top-p acts on drafts alone);
    P is the student's full softmax, which therefore learns the truncated distribution.

    A new divergence is a subclass with `terms`, `slopes` and the two constants for tokens the target excludes.
    """

    needs_target: ClassVar[bool] = True

    @property
    @abstractmethod
    def excluded_value(self) -> float:
        """The divergence per unit of student mass where Q is 0."""

    @property
    @abstractmethod
    def excluded_slope(self) -> float:
        """Derivative by the student's probability where Q is 0; see `slopes`."""

    @abstractmethod
    def terms(self, listed: Listed, log_student: Tensor) -> Tensor:
        """`Q f(P / Q)`: `[m, K]`; `log_student` is log P without underflow."""

    @abstractmethod
    def slopes(self, listed: Listed) -> Tensor:
        """P times the derivative by P: `[m, K]`.

        Derivatives, here and in `excluded_slope`, are up to one constant common to all tokens.
        """

    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `token_ids` is not read."""
        assert target is not None, "checked in Loss.slot_losses"
        probabilities = target.probabilities.to(logits.dtype)
        divergence = _TruncatedDivergence.apply(logits, probabilities, target.token_ids, self)
        assert isinstance(divergence, Tensor)
        return divergence


@dataclass(frozen=True)
class KullbackLeibler(Divergence):
    """`KL(Q_k || P_k) = sum_t Q_k(t) (log Q_k(t) - log P_k(t))`, target Q against student P (paper, section 2).

    Infinite where the student gives probability 0 to a token of positive target probability. See `Divergence`.

    >>> P, Q = torch.tensor([[0.5, 0.5]]), TokenDistribution(torch.tensor([[0.75, 0.25]]))
    >>> KullbackLeibler().per_slot(P.log(), torch.tensor([0]), Q)
    tensor([0.1308])
    """

    sound_for: ClassVar[frozenset[str]] = frozenset({"categorical", "independent", "sequential"})
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType({"one_hot": IGNORES_U})

    @property
    def excluded_value(self) -> float:
        """0 log 0 = 0, and the `+ P` of a term."""
        return 1.0

    @property
    def excluded_slope(self) -> float:
        """See `slopes`."""
        return 0.0

    def terms(self, listed: Listed, log_student: Tensor) -> Tensor:
        """`Q log(Q / P) - Q + P`."""
        student, target, excess = listed
        near = target * (excess - excess.log1p())
        far = target * (target.log() - log_student) - target + student
        return torch.where(excess.abs() < NEARLY_EQUAL, near, far)

    def slopes(self, listed: Listed) -> Tensor:
        """`P (-Q / P)`, and so d KL / d logit_v = P_v - Q_v."""
        return -listed.target


@dataclass(frozen=True)
class ReverseKullbackLeibler(Divergence):
    """`KL(P_k || Q_k) = sum_t P_k(t) (log P_k(t) - log Q_k(t))`, student P against target Q (paper, section 2).

    It is infinite if the student gives any mass to a token of target probability 0, and a softmax gives some mass to
    each token that top-k removed. There each unit of student mass costs `-log floor` nats instead:

        sum_{Q(t) > 0} P(t) log(P(t) / Q(t)) - log(floor) * (mass of P where Q is 0)

    This is at least the divergence from a target with Q = floor there, convex in P, and 0 exactly where P equals Q. The
    floor changes nothing if the target keeps the whole vocabulary.

    Args:
        chunk_size: see `Loss`.
        floor: replaces probability 0 outside the target's support; in (0, 1/e], so that the divergence cannot become
            negative.

    Raises:
        ValueError: if the floor is outside of (0, 1/e].

    >>> P, Q = torch.tensor([[0.5, 0.5]]), TokenDistribution(torch.tensor([[0.75, 0.25]]))
    >>> ReverseKullbackLeibler().per_slot(P.log(), torch.tensor([0]), Q)
    tensor([0.1438])
    """

    floor: float = 1e-6

    sound_for: ClassVar[frozenset[str]] = frozenset({"categorical"})
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"one_hot": IGNORES_U}
        | dict.fromkeys(
            ("independent", "sequential"),
            NOT_THE_MARGINAL.format(
                "KL(P || Q) is smallest at their geometric mean, which drops what any of them excludes"
            ),
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.floor <= math.exp(-1):
            raise ValueError(f"expected floor of ReverseKullbackLeibler in (0, 1/e = 0.3678...], found {self.floor}")

    @property
    def excluded_value(self) -> float:
        """`-log floor`, less the 1 that the `+ Q - P` of the other terms adds for this mass."""
        return -math.log(self.floor) - 1

    @property
    def excluded_slope(self) -> float:
        """As the value, which is linear."""
        return self.excluded_value

    def terms(self, listed: Listed, log_student: Tensor) -> Tensor:
        """`P log(P / Q) - P + Q`."""
        student, target, excess = listed
        near = target * ((1 + excess) * excess.log1p() - excess)
        far = _times_log_ratio(student, target) - student + target
        return torch.where(excess.abs() < NEARLY_EQUAL, near, far)

    def slopes(self, listed: Listed) -> Tensor:
        """`P log(P / Q)`."""
        student, target, excess = listed
        near = student * excess.log1p()
        return torch.where(excess.abs() < NEARLY_EQUAL, near, _times_log_ratio(student, target))


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """`(KL(Q || M) + KL(P || M)) / 2` with `M = (P + Q) / 2`: symmetric, finite, at most log 2. See `Divergence`.

    >>> P, Q = torch.tensor([[0.5, 0.5]]), TokenDistribution(torch.tensor([[0.75, 0.25]]))
    >>> JensenShannon().per_slot(P.log(), torch.tensor([0]), Q)
    tensor([0.0338])
    """

    sound_for: ClassVar[frozenset[str]] = frozenset({"categorical"})
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"one_hot": IGNORES_U}
        | dict.fromkeys(
            ("independent", "sequential"),
            NOT_THE_MARGINAL.format(
                "the Jensen-Shannon divergence is smallest at a point between it and what most of them agree on"
            ),
        )
    )

    @property
    def excluded_value(self) -> float:
        """`P log(P / (P / 2)) / 2`."""
        return math.log(2) / 2

    @property
    def excluded_slope(self) -> float:
        """As the value, which is linear."""
        return self.excluded_value

    def terms(self, listed: Listed, log_student: Tensor) -> Tensor:
        """`(Q log(2 Q / (P + Q)) + P log(2 P / (P + Q))) / 2`."""
        student, target, excess = listed
        near = target * ((1 + excess) * excess.log1p() - (2 + excess) * (excess / 2).log1p())
        middle = (student + target) / 2
        far = _times_log_ratio(target, middle) + _times_log_ratio(student, middle)
        return torch.where(excess.abs() < NEARLY_EQUAL, near, far) / 2

    def slopes(self, listed: Listed) -> Tensor:
        """`P log(2 P / (P + Q)) / 2`."""
        student, target, excess = listed
        near = student * (excess.log1p() - (excess / 2).log1p())
        far = _times_log_ratio(student, (student + target) / 2)
        return torch.where(excess.abs() < NEARLY_EQUAL, near, far) / 2


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """`sum_t |P_k(t) - Q_k(t)| / 2`: a probability, not nats; at most 1. See `Divergence`.

    It is the smallest probability with which tokens drawn from P and Q can differ; `Pick(u, P)` and `Pick(u, Q)` differ
    at least that often. The gradient does not vanish near the optimum, but it is small for tokens of small P, so that
    training is slow far from the optimum.

    >>> P, Q = torch.tensor([[0.5, 0.5]]), TokenDistribution(torch.tensor([[0.75, 0.25]]))
    >>> TotalVariation().per_slot(P.log(), torch.tensor([0]), Q)
    tensor([0.2500])
    """

    sound_for: ClassVar[frozenset[str]] = frozenset({"categorical"})
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"one_hot": IGNORES_U}
        | dict.fromkeys(
            ("independent", "sequential"),
            NOT_THE_MARGINAL.format("the total variation, like a median, drops what only a minority of them contains"),
        )
    )

    @property
    def excluded_value(self) -> float:
        """`|P - 0| / 2`."""
        return 0.5

    @property
    def excluded_slope(self) -> float:
        """As the value, which is linear."""
        return self.excluded_value

    def terms(self, listed: Listed, log_student: Tensor) -> Tensor:
        """`|P - Q| / 2`."""
        return self._difference(listed).abs() / 2

    def slopes(self, listed: Listed) -> Tensor:
        """`P sign(P - Q) / 2`; 0 at equality."""
        return listed.student * self._difference(listed).sign() / 2

    @staticmethod
    def _difference(listed: Listed) -> Tensor:
        return torch.where(listed.excess == 0, 0.0, listed.student - listed.target)


class _TruncatedDivergence(torch.autograd.Function):
    """A divergence per slot: logits [m, V] and Q [m, K] at token ids [m, K] (None: K = V) give [m]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, token_ids: Tensor | None, divergence: Divergence) -> Tensor:
        softmax = logits.softmax(-1)
        ctx.save_for_backward(softmax, target, token_ids)
        ctx.divergence = divergence
        largest, index = softmax.max(-1, keepdim=True)
        largest_logit = logits.gather(-1, index)
        listed = _listed(softmax, target, token_ids)
        if token_ids is None:
            not_listed = softmax.new_zeros(softmax.shape[:-1])
        else:
            not_listed = softmax.scatter(-1, token_ids, 0.0).sum(-1)
            logits = logits.gather(-1, token_ids)
        log_student = torch.where(
            listed.student > SMALLEST_PROBABILITY, listed.student.log(), logits - largest_logit + largest.log()
        )
        terms = divergence.terms(listed, log_student)
        excluded = divergence.excluded_value
        return torch.where(target > 0, terms, excluded * listed.student).sum(-1) + excluded * not_listed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, target, token_ids = ctx.saved_tensors
        divergence: Divergence = ctx.divergence
        # d D / d logit_v = P_v (d D / d P_v - sum_w P_w d D / d P_w)
        listed = _listed(softmax, target, token_ids)
        excluded = divergence.excluded_slope
        slopes = torch.where(target > 0, divergence.slopes(listed), excluded * listed.student)
        grad = grad_divergence.unsqueeze(-1)
        mean_slope = slopes.sum(-1, keepdim=True)
        if token_ids is None:
            return grad * slopes - listed.student * (grad * mean_slope), None, None, None
        if excluded != 0:
            mean_slope = mean_slope + excluded * softmax.scatter(-1, token_ids, 0.0).sum(-1, keepdim=True)
        grad_logits = softmax * (grad * (excluded - mean_slope))
        grad_listed = grad * slopes - listed.student * (grad * mean_slope)
        return grad_logits.scatter_(-1, token_ids, grad_listed), None, None, None


def _listed(softmax: Tensor, target: Tensor, token_ids: Tensor | None) -> Listed:
    student = softmax if token_ids is None else softmax.gather(-1, token_ids)
    excess = (student - target) / target
    rounding = SOFTMAX_ROUNDING_UNITS * torch.finfo(softmax.dtype).eps
    return Listed(student, target, torch.where(excess.abs() <= rounding, 0.0, excess))


def _times_log_ratio(probability: Tensor, other: Tensor) -> Tensor:
    """`p log(p / q)` without overflow of the ratio, with 0 log 0 = 0."""
    return torch.where(probability > 0, probability * (probability.log() - other.log()), 0.0)
