"""Losses over the slots of windows: sums in nats and of weights, projected onto the vocabulary in chunks.

A loss gets hidden states, not logits. It applies the language model head itself, `chunk_size` slots at a time, so that
the [M, V] logits of all slots never exist at once. Behind a frozen head the gradient of a slot's loss by its hidden
state is taken at once, while its logits exist: nothing is projected twice. A head that is trained is run again in the
backward pass, where the weights of the slots are known. Whatever else has to be known of a slot's logits is measured
while they exist (`SlotMeasure`).

Tensor sizes: M slots, m of them not masked, H hidden size, V vocabulary, K candidate tokens kept by the teacher's
sampling settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ptp_lightning.distributions import Distributions, block_rows, chunk_rows, slices
from ptp_lightning.sampling import TokenDistribution, sizes_may_depend_on_values


class LossSum(NamedTuple):
    """A loss before normalisation, so that ranks and micro-batches can be added up exactly.

    `total / count`, after adding up both, is the weighted mean over all slots: it does not change when all weights are
    multiplied by one number.

    Attributes:
        total: scalar, float32 or better: the weighted sum over slots, in nats.
        count: scalar of the same type: the sum of the weights; with weights 0 and 1, the number of slots.
    """

    total: Tensor
    count: Tensor


class SlotTargets(NamedTuple):
    """What M slots should predict.

    Attributes:
        token_ids: [M] int64, the reference tokens; anything where the weight is 0.
        teacher: the teacher's M distributions; None if only the tokens are known.
        weights: [M] float, the weight of each slot; 0 masks it.
    """

    token_ids: Tensor
    teacher: Distributions | None
    weights: Tensor


class SlotLosses(NamedTuple):
    """The losses of m slots, each by itself: of those that are not masked, and on some devices of all (see `of_slots`).

    Attributes:
        slots: [m] int64, which of the M slots these are, in ascending order.
        nats: [m] float32 or better, their losses, not weighted; 0 where masked.
        measured: [m], what was measured of their logits, without gradient; None if nothing was.
    """

    slots: Tensor
    nats: Tensor
    measured: Tensor | None

    def measured_on(self, mask: Tensor) -> Tensor | None:
        """`measured` in the layout `[...]` of all M slots, 0 where masked; None if nothing was."""
        if self.measured is None:
            return None
        return self.measured.new_zeros(mask.numel()).index_copy(0, self.slots, self.measured).view(mask.shape)


Head = Callable[[Tensor], Tensor]
"""Hidden states [m, H] to logits [m, V]."""

SlotMeasure = Callable[[Tensor, Tensor], Tensor]
"""Logits [m, V] and which of the M slots they belong to, [m], to one number for each, [m]."""


@dataclass(frozen=True)
class Loss(ABC):
    """A sum over slots of a term that depends on one slot's logits and its target.

    A new loss is a subclass with the three class attributes and `per_slot`.

    Args:
        chunk_size: slots whose logits exist at the same time, by default as many as the machine likes best. Memory
            grows with `chunk_size * V`; the value and the gradients do not depend on it beyond rounding.

    Raises:
        ValueError: if `chunk_size` is not positive.
    """

    chunk_size: int | None = None

    needs_teacher: ClassVar[bool]
    """Whether `SlotTargets.teacher` is read."""
    sound_for: ClassVar[frozenset[str]]
    """The objectives whose optimum this loss finds."""
    unsound_because: ClassVar[Mapping[str, str]]
    """For every other objective, the reason why not."""

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(
                f"A loss projects at least one slot at a time, found chunk_size={self.chunk_size}. "
                "Set `chunk_size` of the loss to a positive number."
            )

    @abstractmethod
    def per_slot(self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution | None) -> Tensor:
        """The loss of each slot: logits [m, V], token ids [m] and teacher [m, K] give [m], in nats.

        The logits arrive in float32 or better; every slot counts.
        """

    def with_gradients(
        self, logits: Tensor, token_ids: Tensor, teacher: TokenDistribution | None, room: Tensor
    ) -> Tensor:
        """As `per_slot`, without autograd; the gradients by the logits are written to `room` [m, V], of any dtype.

        To be overridden where they can be written down: this takes several passes over the logits more.
        """
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            nats = self.per_slot(leaf, token_ids, teacher)
            room.copy_(torch.autograd.grad(nats.sum(), leaf)[0])
        return nats.detach()

    def __call__(self, hidden: Tensor, head: Head, target: SlotTargets) -> LossSum:
        """Sum the loss over all slots that are not masked; arguments and errors as in `of_slots`.

        Returns:
            The weighted sum in nats and the sum of weights. Without any slot both are 0 and the first still has a
            gradient (of zeros), as distributed training expects of every rank.
        """
        return self.weighted_sum(self.of_slots(hidden, head, target), target.weights)

    def of_slots(
        self, hidden: Tensor, head: Head, target: SlotTargets, measure: SlotMeasure | None = None
    ) -> SlotLosses:
        """The loss of each slot that is not masked.

        On a CPU masked slots are left out and cost nothing. On other devices they are computed and set to 0: how many
        there are is not known without waiting for the device.

        Args:
            hidden: [M, H], the last hidden states of the slots.
            head: the language model head, [m, H] to [m, V]. It is called with no row at all first, which tells V and
                whether the head is trained; then once per chunk, and if it is trained and there are several chunks,
                once more for each in the backward pass.
            target: what the M slots should predict; of its weights, only whether they are 0 is read.
            measure: evaluated once per chunk, without gradient, while the chunk's logits exist.

        Raises:
            ValueError: if the sizes disagree, or if the loss compares distributions and `target.teacher` is None.
        """
        self._check(hidden, target)
        token_ids, teacher, weights = target
        # Whatever stands in masked slots (a NaN, the token id -100) reaches neither the sum nor the gradients.
        counts = weights != 0
        drops_masked = sizes_may_depend_on_values(hidden)
        if drops_masked:
            kept = counts.nonzero().squeeze(-1)
            hidden, token_ids = hidden[kept], token_ids[kept]
        else:
            kept = torch.arange(len(hidden), device=hidden.device)
            hidden, token_ids = torch.where(counts.unsqueeze(-1), hidden, 0), torch.where(counts, token_ids, 0)
        needed_teacher = teacher.at(kept) if teacher is not None and self.needs_teacher else None
        with torch.enable_grad():
            no_logits = head(hidden[:0].detach())
        vocab_size = no_logits.shape[-1]
        chunks = list(slices(kept.numel(), self.chunk_size or chunk_rows(vocab_size, hidden)))
        measured: dict[int, Tensor] = {}  # by the first of the slots; the backward pass does not measure again

        def prepared(logits: Tensor, rows: slice) -> Tensor:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if measure is not None and rows.start not in measured:
                with torch.no_grad():
                    measured[rows.start] = measure(logits.detach(), kept[rows])
            return logits

        def chunk_losses(chunk_hidden: Tensor, rows: slice) -> Tensor:
            own_teacher = None if needed_teacher is None else needed_teacher.at(rows).now()
            return self.per_slot(prepared(head(chunk_hidden), rows), token_ids[rows], own_teacher)

        def block_losses(logits: Tensor, rows: slice, own_teacher: TokenDistribution | None, room: Tensor) -> Tensor:
            return self.with_gradients(prepared(logits, rows), token_ids[rows], own_teacher, room)

        if len(chunks) == 1 and no_logits.requires_grad:  # computing the logits twice would save nothing
            nats = chunk_losses(hidden, chunks[0])
        elif no_logits.requires_grad:
            nats = torch.cat(
                [
                    # A head has no dropout, so there is no random state to put back for the second run.
                    checkpoint(chunk_losses, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False)
                    for rows in chunks
                ]
            )
        elif hidden.requires_grad and torch.is_grad_enabled():
            block_size = block_rows(vocab_size, hidden)
            nats = _LossesWithGradients.apply(hidden, head, block_losses, needed_teacher, chunks, block_size)
            assert isinstance(nats, Tensor)
        else:
            nats = torch.cat([chunk_losses(hidden[rows], rows) for rows in chunks])
        of_slots = torch.cat(list(measured.values())) if measured else None
        if not drops_masked:
            nats = torch.where(counts, nats, 0)
            of_slots = None if of_slots is None else torch.where(counts, of_slots, 0)
        return SlotLosses(kept, nats, of_slots)

    def weighted_sum(self, losses: SlotLosses, weights: Tensor) -> LossSum:
        """Sum `losses`, each times its weight; `weights` [M] get no gradient."""
        kept = weights.detach()[losses.slots].to(losses.nats.dtype)
        return LossSum(total=(losses.nats * kept).sum(), count=kept.sum())

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
        if target.teacher.shape != (num_slots,):
            raise ValueError(
                f"Expected teacher distributions of M = {num_slots} slots, found {list(target.teacher.shape)}."
            )


class _LossesWithGradients(torch.autograd.Function):
    """Losses [m] of hidden states [m, H], each of which depends on its own row alone.

    So the gradient of their sum by a row is that of the row's own loss, whatever weight it gets later.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        block_losses: Callable[[Tensor, slice, TokenDistribution | None, Tensor], Tensor],
        teacher: Distributions | None,
        chunks: list[slice],
        block_size: int,
    ) -> Tensor:
        # What stays is allocated before what goes: small pieces that stay in between would cut freed memory up.
        gradients = torch.empty_like(hidden)
        nats = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        by_logits: Tensor | None = None

        def fill_in(chunk: slice) -> None:
            nonlocal by_logits
            leaf = hidden[chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(leaf)
            if by_logits is None:  # of the first chunk, which no other exceeds
                by_logits = torch.empty_like(logits)
            teachers = repeat(None) if teacher is None else teacher.at(chunk).blocks(block_size)
            for block, own_teacher in zip(slices(len(leaf), block_size), teachers, strict=False):
                slots = slice(chunk.start + block.start, chunk.start + block.stop)
                nats[slots] = block_losses(logits.detach()[block], slots, own_teacher, by_logits[block])
            (gradients[chunk],) = torch.autograd.grad(logits, leaf, by_logits[: len(leaf)])

        for chunk in chunks:  # a function, so that logits are gone before the next ones come
            fill_in(chunk)
        ctx.save_for_backward(gradients)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_nats.unsqueeze(-1)).to(gradients.dtype), None, None, None, None, None
