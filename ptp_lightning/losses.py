"""Losses over the slots of windows: sums in nats and counts, projected onto the vocabulary in chunks.

A loss gets hidden states, not logits. It applies the language model head itself, `chunk_size` slots at a time, and
recomputes each chunk's logits in the backward pass, so that the [M, V] logits of all slots never exist at once.
Every loss says for which training objectives it is sound; `require_sound` turns a wrong pairing into an error.

Tensor sizes: M slots, H hidden size, V vocabulary, K candidate tokens kept by the teacher's sampling settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ptp_lightning.sampling import TokenDistribution

OBJECTIVES = frozenset({"one_hot", "categorical", "independent", "sequential"})

# Below this a float32 softmax is about to lose its digits to underflow, so its logarithm is taken from the logits.
SMALLEST_PROBABILITY = 1e-30

# Two softmaxes of one row, added up in different orders, may differ by so many units in the last place.
SOFTMAX_ROUNDING_UNITS = 64


class LossSum(NamedTuple):
    """A loss before normalisation, so that ranks and micro-batches can be added up exactly.

    Attributes:
        total: scalar, float32 or better: the weighted sum over slots, in nats.
        count: scalar of the same type: the number of slots with a weight other than 0.
    """

    total: Tensor
    count: Tensor


class SlotTargets(NamedTuple):
    """What M slots should predict.

    Attributes:
        token_ids: [M] int64, the reference tokens; anything where the weight is 0.
        teacher: the teacher's distributions, [M, K]; None if only the tokens are known.
        weights: [M] float, the weight of each slot; 0 masks it.
    """

    token_ids: Tensor
    teacher: TokenDistribution | None
    weights: Tensor


Head = Callable[[Tensor], Tensor]
"""Hidden states [m, H] to logits [m, V]."""


@dataclass(frozen=True)
class Loss(ABC):
    """A sum over slots of a term that depends on one slot's logits and its target.

    A new loss is a subclass with the three class attributes and `per_slot`.

    Args:
        chunk_size: slots whose logits exist at the same time. Memory grows with `chunk_size * V`; the value and the
            gradients do not depend on it beyond rounding.

    Raises:
        ValueError: if `chunk_size` is not positive.
    """

    chunk_size: int = 1024

    needs_teacher: ClassVar[bool]
    """Whether `SlotTargets.teacher` is read."""
    sound_for: ClassVar[frozenset[str]]
    """The objectives whose optimum this loss finds."""
    unsound_because: ClassVar[Mapping[str, str]]
    """For every other objective, the reason why not."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(
                f"A loss projects at least one slot at a time, found chunk_size={self.chunk_size}. "
                "Set `chunk_size` of the loss to a positive number."
            )

    @abstractmethod
    def per_slot(self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution | None) -> Tensor:
        """The loss of each slot: logits [m, V], token ids [m] and teacher [m, K] give [m], in nats.

        The logits arrive in float32 or better; every slot counts.
        """

    def __call__(self, hidden: Tensor, head: Head, target: SlotTargets) -> LossSum:
        """Sum the loss over all slots that are not masked.

        Args:
            hidden: [M, H], the last hidden states of the slots.
            head: the language model head, [m, H] to [m, V]; called once per chunk, and if there are several, once more
                in the backward pass.
            target: what the M slots should predict.

        Returns:
            The sum in nats and the number of slots. Without any slot the sum is 0 and still has a gradient (of
            zeros), as distributed training expects of every rank.

        Raises:
            ValueError: if the sizes disagree, or if the loss compares distributions and `target.teacher` is None.
        """
        self._check(hidden, target)
        token_ids, teacher, weights = target
        # Masked slots are dropped before the projection: they cost nothing, and whatever stands in them (a NaN, the
        # token id -100) reaches neither the sum nor the gradients.
        kept = weights.nonzero().squeeze(-1)
        hidden, token_ids, weights = hidden[kept], token_ids[kept], weights[kept]
        if teacher is not None and self.needs_teacher:
            teacher = _take(teacher, kept)

        def chunk_total(chunk_hidden: Tensor, rows: slice) -> Tensor:
            logits = head(chunk_hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chunk_teacher = _take(teacher, rows) if teacher is not None and self.needs_teacher else None
            losses = self.per_slot(logits, token_ids[rows], chunk_teacher)
            return (losses * weights[rows].to(losses.dtype)).sum()

        num_slots = kept.numel()
        chunks = [slice(start, start + self.chunk_size) for start in range(0, max(num_slots, 1), self.chunk_size)]
        if len(chunks) == 1:  # computing the logits twice would save nothing
            total = chunk_total(hidden, chunks[0])
        else:
            totals = [
                # A head has no dropout, so there is no random state to put back for the second run.
                checkpoint(chunk_total, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False)
                for rows in chunks
            ]
            total = torch.stack(totals).sum()
        return LossSum(total=total, count=torch.full_like(total, num_slots))

    def _check(self, hidden: Tensor, target: SlotTargets) -> None:
        num_slots = hidden.shape[0]
        if hidden.ndim != 2 or target.token_ids.shape != (num_slots,) or target.weights.shape != (num_slots,):
            raise ValueError(
                "Expected hidden [M, H], token_ids [M] and weights [M], found "
                f"{list(hidden.shape)}, {list(target.token_ids.shape)} and {list(target.weights.shape)}."
            )
        if not self.needs_teacher:
            return
        if target.teacher is None:
            raise ValueError(
                f"{type(self).__name__} compares with the teacher's distribution, but the targets hold only tokens. "
                "Choose a `loss` that needs no teacher (CrossEntropy), or a training module that provides one."
            )
        if target.teacher.probabilities.shape[:-1] != (num_slots,):
            raise ValueError(
                f"Expected teacher probabilities [M, K] with M = {num_slots}, "
                f"found {list(target.teacher.probabilities.shape)}."
            )


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """`-log P_theta(t_k | ...)`, the negative log-likelihood of the reference token (paper, Algorithms 2 and 3).

    The loss of one-hot PTP, which it can bring to 0, and of teacher-free training. For categorical PTP and the
    independent baseline it is an unbiased, noisier stand-in for the divergence: the reference token is a sample of
    the teacher's distribution, so both have the same expected gradient.
    """

    needs_teacher: ClassVar[bool] = False
    sound_for: ClassVar[frozenset[str]] = OBJECTIVES
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def per_slot(self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `teacher` is not read."""
        return F.cross_entropy(logits, token_ids, reduction="none")


@dataclass(frozen=True)
class KullbackLeibler(Loss):
    """`KL(Q_k || P_k) = sum_t Q_k(t) (log Q_k(t) - log P_k(t))`, teacher Q against student P (paper, section 2).

    Q is the teacher's distribution after temperature and top-k (`SamplingConfig.target`; top-p is left to the
    proposal); P is the student's full softmax, which therefore learns the truncated distribution. Only the K tokens
    that the teacher kept need their logarithm (0 log 0 = 0). The divergence is never negative, exactly 0 where P equals
    Q, and infinite where the student gives probability 0 to a token the teacher may pick. The teacher gets no gradient.
    """

    needs_teacher: ClassVar[bool] = True
    sound_for: ClassVar[frozenset[str]] = OBJECTIVES - {"one_hot"}
    unsound_because: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "one_hot": (
                "a one-hot student is told u_k, which fixes the token t_k, so its target is the point mass on t_k and "
                "not the teacher's distribution Q_k; matching Q_k would teach it to ignore u_k"
            )
        }
    )

    def per_slot(self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `token_ids` is not read."""
        assert teacher is not None, "checked in Loss.__call__"
        probabilities = teacher.probabilities.to(logits.dtype)
        divergence = _TruncatedKullbackLeibler.apply(logits, probabilities, teacher.token_ids)
        assert isinstance(divergence, Tensor)
        return divergence


def require_sound(loss: Loss | type[Loss], objective_name: str) -> None:
    """Refuse a loss whose minimum is not what the objective asks for.

    Args:
        loss: the loss, or its class.
        objective_name: one of `OBJECTIVES`.

    Raises:
        ValueError: with the reason, if the loss is unsound for the objective; or if there is no such objective.
    """
    if objective_name not in OBJECTIVES:
        raise ValueError(f"Expected an objective out of {sorted(OBJECTIVES)}, found {objective_name!r}.")
    if objective_name in loss.sound_for:
        return
    name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
    raise ValueError(
        f"{name} is not a sound loss for the {objective_name} objective: {loss.unsound_because[objective_name]}. "
        f"Set `loss.class_path` to another loss (CrossEntropy, say), or `objective` to one of {sorted(loss.sound_for)}."
    )


class _TruncatedKullbackLeibler(torch.autograd.Function):
    """`KL(Q || softmax(logits))` per slot: logits [m, V], Q [m, K] at token ids [m, K] (None: K = V) give [m].

    Both sides add up to 1, so `- Q + P` may be added to every term:

        KL(Q || P) = sum_{t kept} (Q log(Q / P) - Q + P) + sum_{t not kept} P

    Now no term is negative, and near equality a term is of second order in P / Q - 1, where `Q log(Q / P)` is of first
    order and would show the rounding errors of P and Q. Differences as small as those errors count as equality; what
    that leaves out is below 1e-10 nats.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, token_ids: Tensor | None) -> Tensor:
        softmax = logits.softmax(-1)
        ctx.save_for_backward(softmax, teacher, token_ids)
        largest, index = softmax.max(-1, keepdim=True)
        largest_logit = logits.gather(-1, index)
        if token_ids is None:
            student, not_kept = softmax, softmax.new_zeros(softmax.shape[:-1])
        else:
            student, logits = softmax.gather(-1, token_ids), logits.gather(-1, token_ids)
            not_kept = softmax.scatter(-1, token_ids, 0.0).sum(-1)
        log_student = torch.where(student > SMALLEST_PROBABILITY, student.log(), logits - largest_logit + largest.log())
        excess = (student - teacher) / teacher  # P / Q - 1
        rounding = SOFTMAX_ROUNDING_UNITS * torch.finfo(logits.dtype).eps
        excess = torch.where(excess.abs() <= rounding, 0.0, excess)
        nearly_equal = teacher * (excess - excess.log1p())
        elsewhere = teacher * (teacher.log() - log_student) - teacher + student
        terms = torch.where(excess.abs() < 0.5, nearly_equal, elsewhere)
        return torch.where(teacher > 0, terms, student).sum(-1) + not_kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor) -> tuple[Tensor, None, None]:
        softmax, teacher, token_ids = ctx.saved_tensors
        # d KL / d logit_v = P_v - Q_v; the mass of Q is 1 up to rounding
        grad = grad_divergence.unsqueeze(-1)
        grad_logits = softmax * (grad * teacher.sum(-1, keepdim=True))
        if token_ids is None:
            return grad_logits - grad * teacher, None, None
        return grad_logits.scatter_add_(-1, token_ids, -grad * teacher), None, None


def _take(distribution: TokenDistribution, rows: Tensor | slice) -> TokenDistribution:
    token_ids = distribution.token_ids
    return distribution._replace(
        probabilities=distribution.probabilities[rows],
        token_ids=None if token_ids is None else token_ids[rows],
    )
