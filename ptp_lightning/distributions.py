"""Distributions over whole vocabularies, computed lazily from hidden states, a few rows at a time.

The output head is efficient with hundreds of rows. The dozen passes over the logits that follow are efficient while the
logits fit in a CPU's cache. Logits are therefore computed in chunks, and each chunk is processed in smaller blocks. A
GPU needs large chunks and has no use for blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick, token_interval
from ptp_lightning.sampling import Sampler, TokenDistribution, leading_index

PRODUCT_ROWS = 256  # measured with a vocabulary of 32000: 64 rows reach 0.6 of the peak matmul rate, 256 rows 0.9
CHUNK_LOGITS_CPU = 2**23
"""At most in a chunk, unless that leaves fewer than `LEAST_PRODUCT_ROWS` rows."""
LEAST_PRODUCT_ROWS = 64
BLOCK_LOGITS_CPU = 2**20
CHUNK_LOGITS_GPU = 2**26


@dataclass(frozen=True)
class LazyDistributions:
    """The distributions that `sampler` gives for the logits of hidden states; no gradients.

    Args:
        hidden: `[..., H]`.
        head: hidden states `[m, H]` to logits `[m, V]`.
        sampler: from logits to distributions.
        is_target: whether they are the targets of students (`SamplingConfig.target`) instead of the teacher.

    >>> from ptp_lightning.sampling import SamplingConfig
    >>> hidden, weight = torch.randn(2, 3, 4), torch.randn(10, 4)
    >>> P = LazyDistributions(hidden, lambda states: states @ weight.T, Sampler(SamplingConfig()))
    >>> P.shape, P.materialize().probabilities.shape
    (torch.Size([2, 3]), torch.Size([2, 3, 10]))
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    sampler: Sampler
    is_target: bool = False

    @property
    def shape(self) -> torch.Size:
        """The shape `[...]` of the distributions."""
        return self.hidden.shape[:-1]

    def at(self, index: Any) -> LazyDistributions:
        """See `TokenDistribution.at`."""
        return replace(self, hidden=self.hidden[leading_index(index)])

    def flatten(self) -> LazyDistributions:
        """See `TokenDistribution.flatten`."""
        return replace(self, hidden=self.hidden.flatten(0, -2))

    @torch.no_grad()
    def materialize(self) -> TokenDistribution:
        """Compute all distributions at once: `[..., K]`."""
        return self._of(self.head(self.hidden))

    def chunks(self, values: Tensor) -> Iterator[tuple[TokenDistribution, Tensor]]:
        """A few distributions at a time, with the corresponding entries of `values` `[...]`."""
        hidden = self.hidden.flatten(0, -2)
        vocab_size = self.head(hidden[:0]).shape[-1]
        size, block_size = chunk_rows(vocab_size, hidden), block_rows(vocab_size, hidden)
        for chunk, own in zip(hidden.split(size), values.flatten().split(size), strict=True):
            yield from zip(replace(self, hidden=chunk).blocks(block_size), own.split(block_size), strict=True)

    @torch.no_grad()
    def blocks(self, size: int) -> Iterator[TokenDistribution]:
        """All `[M]` distributions, `size` at a time, from logits that are computed at once."""
        for logits in self.head(self.hidden).split(size):
            yield self._of(logits)

    def _of(self, logits: Tensor) -> TokenDistribution:
        return self.sampler.teacher_and_target(logits)[int(self.is_target)]


Distributions = TokenDistribution | LazyDistributions
"""Both have `shape`, `at`, `flatten`, `materialize` and `blocks`."""


@torch.no_grad()
def chunked_pick(u: Tensor, P: Distributions) -> Tensor:
    """`pick(u, P)`, a chunk at a time if P is lazy."""
    if isinstance(P, TokenDistribution):
        return pick(u, P)
    token_ids = u.new_empty(u.numel(), dtype=torch.long)
    begin = 0
    for chunk, own in P.chunks(u):
        token_ids[begin : begin + len(own)] = pick(own, chunk)
        begin += len(own)
    return token_ids.view(u.shape)


@torch.no_grad()
def chunked_token_interval(P: Distributions, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`token_interval(P, token_ids)`, a chunk at a time if P is lazy."""
    if isinstance(P, TokenDistribution):
        return token_interval(P, token_ids)
    lower, upper = torch.empty(2, token_ids.numel(), dtype=torch.float64, device=token_ids.device)
    begin = 0
    for chunk, own in P.chunks(token_ids):
        rows = slice(begin, begin + len(own))
        lower[rows], upper[rows] = token_interval(chunk, own)
        begin = rows.stop
    return lower.view(token_ids.shape), upper.view(token_ids.shape)


def chunk_rows(vocab_size: int, hidden: Tensor) -> int:
    """Rows whose logits are computed by one matrix product, on the device of the hidden states."""
    if hidden.is_cuda:
        return max(CHUNK_LOGITS_GPU // vocab_size, LEAST_PRODUCT_ROWS)
    return max(min(PRODUCT_ROWS, CHUNK_LOGITS_CPU // vocab_size), BLOCK_LOGITS_CPU // vocab_size, LEAST_PRODUCT_ROWS)


def block_rows(vocab_size: int, hidden: Tensor) -> int:
    """Rows of a chunk that are processed at once."""
    return chunk_rows(vocab_size, hidden) if hidden.is_cuda else max(BLOCK_LOGITS_CPU // vocab_size, 1)


def slices(length: int, size: int) -> Iterator[slice]:
    """Slices of `length` rows, `size` at a time; a single empty slice if there are no rows.

    >>> list(slices(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for begin in range(0, max(length, 1), size):
        yield slice(begin, min(begin + size, length))
