"""Chunks have enough rows for a product, and no more logits than memory likes; blocks lie in a cache."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ptp_lightning.distributions import block_rows, chunk_rows, slices

HIDDEN = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("vocab_size", "chunk", "block"),
    [
        (2**8, 4096, 4096),  # as many as fit into a cache
        (2**12, 256, 256),
        (2**15, 256, 32),  # enough for a product, fewer at once
        (2**16, 128, 16),  # 2^23 logits
        (2**18, 64, 4),  # more, because fewer rows make a slow product
        (2**21, 64, 1),
    ],
)
def test_on_a_cpu(vocab_size: int, chunk: int, block: int) -> None:
    assert (chunk_rows(vocab_size, HIDDEN), block_rows(vocab_size, HIDDEN)) == (chunk, block)


@pytest.mark.parametrize(("vocab_size", "chunk"), [(2**16, 1024), (2**21, 64)])
def test_on_a_gpu_all_of_a_chunk_at_once(vocab_size: int, chunk: int) -> None:
    with patch.object(Tensor, "is_cuda", True):
        assert chunk_rows(vocab_size, HIDDEN) == block_rows(vocab_size, HIDDEN) == chunk


@pytest.mark.parametrize(
    ("length", "pieces"),
    [(0, [(0, 0)]), (3, [(0, 3)]), (4, [(0, 4)]), (5, [(0, 4), (4, 5)]), (8, [(0, 4), (4, 8)])],
)
def test_slices(length: int, pieces: list[tuple[int, int]]) -> None:
    assert [(piece.start, piece.stop) for piece in slices(length, 4)] == pieces
