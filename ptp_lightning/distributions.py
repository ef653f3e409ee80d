"""Distributions over whole vocabularies that are made from hidden states when they are asked for, a few at a time.

A matrix product by a vocabulary is fast when it has hundreds of rows. What follows it, a dozen passes over the logits,
is fast where they still lie in a processor's cache. So logits are made in chunks, and each chunk is worked on in
smaller blocks. A GPU has no such cache, and is slow with small chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick, token_interval
from ptp_lightning.sampling import Sampler, TokenDistribution, leading

PRODUCT_ROWS = 256  # measured: 64 rows by a vocabulary of 32000 reach 0.6 of a square product's rate, 256 rows 0.9
CHUNK_LOGITS_CPU = 2**23
"""At most in a chunk, as far as the product stays bearable."""
LEAST_PRODUCT_ROWS = 64
BLOCK_LOGITS_CPU = 2**20
CHUNK_LOGITS_GPU = 2**26


@dataclass(frozen=True)
class LazyDistributions:
    """What `sampler` makes of the logits of hidden states; no gradients.

    Args:
        hidden: `[..., H]`.
        head: hidden states `[m, H]` to logits `[m, V]`.
        sampler: from logits to distributions.
        is_target: whether they are what students learn (`SamplingConfig.target`) instead of what is sampled from.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    sampler: Sampler
    is_target: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the distributions: `[...]`."""
        return self.hidden.shape[:-1]

    def at(self, index: Any) -> LazyDistributions:
        """Some of them; see `TokenDistribution.at`."""
        return replace(self, hidden=self.hidden[leading(index)])

    def flat(self) -> LazyDistributions:
        """One after the other."""
        return replace(self, hidden=self.hidden.flatten(0, -2))

    @torch.no_grad()
    def now(self) -> TokenDistribution:
        """All of them at once: `[..., K]`."""
        return self._of(self.head(self.hidden))

    def chunks(self, values: Tensor) -> Iterator[tuple[TokenDistribution, Tensor]]:
        """A few distributions at a time, and of `values` `[...]` those that belong to them."""
        hidden = self.hidden.flatten(0, -2)
        vocab_size = self.head(hidden[:0]).shape[-1]
        size, block_size = chunk_rows(vocab_size, hidden), block_rows(vocab_size, hidden)
        for chunk, own in zip(hidden.split(size), values.flatten().split(size), strict=True):
            yield from zip(replace(self, hidden=chunk).blocks(block_size), own.split(block_size), strict=True)

    @torch.no_grad()
    def blocks(self, size: int) -> Iterator[TokenDistribution]:
        """All `[M]` of them, `size` at a time, from logits that are made at once."""
        for logits in self.head(self.hidden).split(size):
            yield self._of(logits)

    def _of(self, logits: Tensor) -> TokenDistribution:
        return self.sampler.teacher_and_target(logits)[int(self.is_target)]


Distributions = TokenDistribution | LazyDistributions
"""Anything with `shape`, `at`, `flat`, `now` and `blocks`."""


@torch.no_grad()
def picks(u: Tensor, P: Distributions) -> Tensor:
    """`pick(u, P)`, a few at a time where P is lazy."""
    if isinstance(P, TokenDistribution):
        return pick(u, P)
    token_ids = u.new_empty(u.numel(), dtype=torch.long)
    begin = 0
    for chunk, own in P.chunks(u):
        token_ids[begin : begin + len(own)] = pick(own, chunk)
        begin += len(own)
    return token_ids.view(u.shape)


@torch.no_grad()
def intervals(P: Distributions, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`token_interval(P, token_ids)`, a few at a time where P is lazy."""
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
    """Rows whose logits are made by one product, of hidden states where these are."""
    if hidden.is_cuda:
        return max(CHUNK_LOGITS_GPU // vocab_size, LEAST_PRODUCT_ROWS)
    return max(min(PRODUCT_ROWS, CHUNK_LOGITS_CPU // vocab_size), BLOCK_LOGITS_CPU // vocab_size, LEAST_PRODUCT_ROWS)


def block_rows(vocab_size: int, hidden: Tensor) -> int:
    """Rows of a chunk that are worked on at once."""
    return chunk_rows(vocab_size, hidden) if hidden.is_cuda else max(BLOCK_LOGITS_CPU // vocab_size, 1)


def slices(length: int, size: int) -> Iterator[slice]:
    """Of `length` rows, `size` at a time; one that is empty if there are none."""
    for begin in range(0, max(length, 1), size):
        yield slice(begin, min(begin + size, length))
