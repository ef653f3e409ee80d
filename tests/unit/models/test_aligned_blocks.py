"""Attention in aligned blocks is causal attention, and a token's result depends on the text before it alone."""

import pytest
import torch
from torch.nn import functional as F

from ptp_lightning.models.attention.aligned_blocks import BLOCK_SIZE, AlignedBlocks, TokenRun

NUM_KEYS, HEAD_SIZE = 96, 16


def attend(lengths: list[int], num_tokens: int, dtype: torch.dtype, num_heads: int = 6) -> torch.Tensor:
    """Of tokens that follow rows of these lengths; all of them are parts of the same two texts: `[B, T, heads, D]`."""
    torch.manual_seed(0)
    query = torch.randn(2, NUM_KEYS, num_heads, HEAD_SIZE).to(dtype)
    keys, values = (torch.randn(2, 2, NUM_KEYS, HEAD_SIZE).to(dtype) for _ in range(2))
    rows = torch.cat([query[row, length : length + num_tokens] for row, length in enumerate(lengths)])
    runs = [TokenRun(row, length, range(num_tokens)) for row, length in enumerate(lengths)]
    blocks = AlignedBlocks(runs, num_tokens, num_heads // 2, dtype)
    count = len(lengths)
    return blocks.attend(rows, keys[:count], values[:count], 0.3).unflatten(0, (count, num_tokens))


@pytest.mark.parametrize("num_heads", [2, 6])
def test_it_is_causal_attention(num_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, NUM_KEYS, num_heads, HEAD_SIZE).transpose(1, 2)
    keys, values = (torch.randn(2, 2, NUM_KEYS, HEAD_SIZE) for _ in range(2))
    expected = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.3, enable_gqa=True)
    found = attend([0, 0], NUM_KEYS, torch.float32, num_heads)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_position_alone(dtype: torch.dtype) -> None:
    whole = attend([0, 0], NUM_KEYS, dtype)
    for size in (1, 2, 3, 4, 5, 7, 16, 33, 64):
        for length in range(0, NUM_KEYS - size, 5):
            assert torch.equal(attend([length], size, dtype)[0], whole[0, length : length + size])
    ragged = attend([17, 40], 6, dtype)
    assert torch.equal(ragged[0], whole[0, 17:23]) and torch.equal(ragged[1], whole[1, 40:46])


def test_keys_after_a_token_do_not_matter() -> None:
    """Nor do those of its own block."""
    query, keys = torch.randn(1, 2, HEAD_SIZE), torch.randn(1, 2, 2 * BLOCK_SIZE, HEAD_SIZE)
    blocks = AlignedBlocks([TokenRun(0, BLOCK_SIZE, [0])], 1, 1, torch.float32)
    before = blocks.attend(query, keys, keys, 0.3)
    keys[:, :, BLOCK_SIZE + 1 :] = 1e3
    assert torch.equal(blocks.attend(query, keys, keys, 0.3), before)
