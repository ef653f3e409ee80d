"""Losses over the slots of windows: sums in nats and of weights, projected onto the vocabulary in chunks.

A loss takes hidden states, not logits. It applies the language model head itself, `chunk_size` slots at a time, so that
the [M, V] logits of all slots never exist at once. If the head is frozen, the gradient of a slot's loss with respect to
its hidden state is computed in the forward pass, while the logits exist: nothing is projected twice. If the head is
trained, it runs again in the backward pass, when the weights of the slots are known. Other quantities that depend on a
slot's logits are measured while these exist (`SlotMeasure`).

Tensor sizes: M slots, m of them not masked, H hidden size, V vocabulary, K candidate tokens that the sampling settings
keep.
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
from ptp_lightning.sampling import TokenDistribution, allows_dynamic_shapes


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
        target: M distributions to be learned; None if only the tokens are known.
        weights: [M] float, the weight of each slot; 0 masks it.
    """

    token_ids: Tensor
    target: Distributions | None
    weights: Tensor


class SlotLosses(NamedTuple):
    """The unweighted losses of m slots: of those that are not masked, or of all slots (see `Loss.slot_losses`).

    Attributes:
        slots: [m] int64, indices into the M slots, ascending.
        nats: [m] float32 or better, the losses; 0 where masked.
        measured: [m], the values of the `SlotMeasure`, without gradient; None without a measure.
    """

    slots: Tensor
    nats: Tensor
    measured: Tensor | None

    def measured_on(self, mask: Tensor) -> Tensor | None:
        """`measured` in the shape `[...]` of the mask of all M slots, 0 where masked; None without a measure."""
        if self.measured is None:
            return None
        return self.measured.new_zeros(mask.numel()).index_copy(0, self.slots, self.measured).view(mask.shape)


Head = Callable[[Tensor], Tensor]
"""Hidden states [m, H] to logits [m, V]."""

SlotMeasure = Callable[[Tensor, Tensor], Tensor]
"""Logits [m, V] of m slots and their indices [m] into the M slots, to one number for each, [m]."""


@dataclass(frozen=True)
class Loss(ABC):
    """A sum over slots of a term that depends on one slot's logits and targets.

    A new loss is a subclass with the three class attributes and `per_slot`.

    Args:
        chunk_size: slots whose logits exist at the same time; by default the number that is fastest on the device.
            Memory grows with `chunk_size * V`; value and gradients do not depend on it beyond rounding.

    Raises:
        ValueError: if `chunk_size` is not positive.
    """

    chunk_size: int | None = None

    needs_target: ClassVar[bool]
    """Whether `SlotTargets.target` is read."""
    sound_for: ClassVar[frozenset[str]]
    """The objectives whose optimum minimises this loss."""
    unsound_because: ClassVar[Mapping[str, str]]
    """For every other objective, the reason why not."""

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(
                f"A loss projects at least one slot at a time, found chunk_size={self.chunk_size}. "
                "Set `chunk_size` of the loss to a positive number."
            )

    @abstractmethod
    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """The loss of each slot: logits [m, V], token ids [m] and target [m, K] give [m], in nats.

        The logits arrive in float32 or better; every slot counts.
        """

    def with_gradients(
        self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None, out: Tensor
    ) -> Tensor:
        """As `per_slot`, without autograd; gradients with respect to the logits are written to `out` [m, V].

        Losses with a closed-form gradient should override this: autograd needs several more passes over the logits.
        """
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            nats = self.per_slot(leaf, token_ids, target)
            out.copy_(torch.autograd.grad(nats.sum(), leaf)[0])
        return nats.detach()

    def __call__(self, hidden: Tensor, head: Head, targets: SlotTargets) -> LossSum:
        """Sum the loss over all slots that are not masked; arguments and errors as in `slot_losses`.

        Returns:
            The weighted sum in nats and the sum of weights. Without any slot both are 0, and the first still has a
            gradient of zeros, because distributed training needs a gradient on every rank.
        """
        return self.weighted_sum(self.slot_losses(hidden, head, targets), targets.weights)

    def slot_losses(
        self, hidden: Tensor, head: Head, targets: SlotTargets, measure: SlotMeasure | None = None
    ) -> SlotLosses:
        """The loss of each slot that is not masked.

        On a CPU masked slots are left out and cost nothing. On other devices they are computed and set to 0, because
        counting them would synchronise with the device.

        Args:
            hidden: [M, H], the last hidden states of the slots.
            head: the language model head, [m, H] to [m, V]. The first call has no rows and shows V and whether the
                head is trained. Then there is one call per chunk, and one more per chunk in the backward pass if the
                head is trained and there are several chunks.
            targets: what the M slots should predict; weights only count as zero or not zero.
            measure: evaluated once per chunk, without gradient, while the chunk's logits exist.

        Raises:
            ValueError: if the sizes disagree, or if the loss compares distributions and `targets.target` is None.
        """
        self._check(hidden, targets)
        token_ids, target, weights = targets
        # Values in masked slots (a NaN, the token id -100) reach neither the sum nor the gradients.
        counts = weights != 0
        drops_masked = allows_dynamic_shapes(hidden)
        if drops_masked:
            kept = counts.nonzero().squeeze(-1)
            hidden, token_ids = hidden[kept], token_ids[kept]
        else:
            kept = torch.arange(len(hidden), device=hidden.device)
            hidden, token_ids = torch.where(counts.unsqueeze(-1), hidden, 0), torch.where(counts, token_ids, 0)
        needed_target = target.at(kept) if target is not None and self.needs_target else None
        with torch.enable_grad():
            no_logits = head(hidden[:0].detach())
        vocab_size = no_logits.shape[-1]
        chunks = list(slices(kept.numel(), self.chunk_size or chunk_rows(vocab_size, hidden)))
        measured: dict[int, Tensor] = {}  # by the first slot of a chunk; the backward pass does not measure again

        def prepared(logits: Tensor, rows: slice) -> Tensor:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if measure is not None and rows.start not in measured:
                with torch.no_grad():
                    measured[rows.start] = measure(logits.detach(), kept[rows])
            return logits

        def chunk_losses(chunk_hidden: Tensor, rows: slice) -> Tensor:
            own_target = None if needed_target is None else needed_target.at(rows).materialize()
            return self.per_slot(prepared(head(chunk_hidden), rows), token_ids[rows], own_target)

        def block_losses(logits: Tensor, rows: slice, own_target: TokenDistribution | None, out: Tensor) -> Tensor:
            return self.with_gradients(prepared(logits, rows), token_ids[rows], own_target, out)

        if len(chunks) == 1 and no_logits.requires_grad:  # computing the logits twice would save nothing
            nats = chunk_losses(hidden, chunks[0])
        elif no_logits.requires_grad:
            nats = torch.cat(
                [
                    # A head has no dropout, so the second run needs no saved random state.
                    checkpoint(chunk_losses, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False)
                    for rows in chunks
                ]
            )
        elif hidden.requires_grad and torch.is_grad_enabled():
            block_size = block_rows(vocab_size, hidden)
            nats = _LossesWithGradients.apply(hidden, head, block_losses, needed_target, chunks, block_size)
            assert isinstance(nats, Tensor)
        else:
            nats = torch.cat([chunk_losses(hidden[rows], rows) for rows in chunks])
        values = torch.cat(list(measured.values())) if measured else None
        if not drops_masked:
            nats = torch.where(counts, nats, 0)
            values = None if values is None else torch.where(counts, values, 0)
        return SlotLosses(kept, nats, values)

    def weighted_sum(self, losses: SlotLosses, weights: Tensor) -> LossSum:
        """Sum `losses`, each times its weight; `weights` [M] get no gradient."""
        kept = weights.detach()[losses.slots].to(losses.nats.dtype)
        return LossSum(total=(losses.nats * kept).sum(), count=kept.sum())

    def _check(self, hidden: Tensor, targets: SlotTargets) -> None:
        num_slots = hidden.shape[0]
        if hidden.ndim != 2 or targets.token_ids.shape != (num_slots,) or targets.weights.shape != (num_slots,):
            raise ValueError(
                "Expected hidden [M, H], token_ids [M] and weights [M], found "
                f"{list(hidden.shape)}, {list(targets.token_ids.shape)} and {list(targets.weights.shape)}."
            )
        if not self.needs_target:
            return
        if targets.target is None:
            raise ValueError(
                f"{type(self).__name__} compares with a target distribution, but the targets hold only tokens. "
                "Choose a `loss` that needs no target distribution (CrossEntropy), or a training module that provides "
                "one."
            )
        if targets.target.shape != (num_slots,):
            raise ValueError(
                f"Expected target distributions of M = {num_slots} slots, found {list(targets.target.shape)}."
            )


class _LossesWithGradients(torch.autograd.Function):
    """Losses [m] of hidden states [m, H]; each loss depends on its own row alone.

    The gradient of the sum with respect to a row is therefore that of the row's own loss, and weights can be multiplied
    in later.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        block_losses: Callable[[Tensor, slice, TokenDistribution | None, Tensor], Tensor],
        target: Distributions | None,
        chunks: list[slice],
        block_size: int,
    ) -> Tensor:
        # Tensors that outlive the chunks are allocated first, so that they do not fragment the memory of the chunks.
        gradients = torch.empty_like(hidden)
        nats = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        logit_gradients: Tensor | None = None

        def process(chunk: slice) -> None:
            nonlocal logit_gradients
            leaf = hidden[chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(leaf)
            if logit_gradients is None:  # the first chunk is the largest
                logit_gradients = torch.empty_like(logits)
            target_blocks = repeat(None) if target is None else target.at(chunk).blocks(block_size)
            for block, own_target in zip(slices(len(leaf), block_size), target_blocks, strict=False):
                slots = slice(chunk.start + block.start, chunk.start + block.stop)
                nats[slots] = block_losses(logits.detach()[block], slots, own_target, logit_gradients[block])
            (gradients[chunk],) = torch.autograd.grad(logits, leaf, logit_gradients[: len(leaf)])

        for chunk in chunks:  # a function frees the logits of one chunk before those of the next are made
            process(chunk)
        ctx.save_for_backward(gradients)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_nats.unsqueeze(-1)).to(gradients.dtype), None, None, None, None, None
