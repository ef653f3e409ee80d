"""How many rows of logits `[rows, V]` to make and to work on at once.

A matrix product by a vocabulary is fast when it has hundreds of rows. What follows it, a dozen passes over the logits,
is fast where they still lie in a processor's cache. So logits are made in chunks, and each chunk is worked on in
smaller blocks. A GPU has no such cache, and likes neither small.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PRODUCT_ROWS = 256  # measured: 64 rows by a vocabulary of 32000 reach 0.6 of a square product's rate, 256 rows 0.9
CHUNK_LOGITS_CPU = 2**23
"""At most in a chunk, as far as the product stays bearable."""
LEAST_PRODUCT_ROWS = 64
BLOCK_LOGITS_CPU = 2**20
CHUNK_LOGITS_GPU = 2**26


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
