"""Attention masks of context tokens and of slots.

A context token sees the tokens of its own document up to itself. A slot of a window sees the context tokens of the
window's document before the window's start, and the slots of its own window up to itself. It never sees another window,
another document, or context tokens at or after the window's start.
"""

import torch
from torch import Tensor


def context_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within documents.

    Args:
        document_ids: `[B, S]`, one number per document in a row; padding is a document of its own.

    Returns:
        `[B, 1, S, S]` bool, true where a query (third axis) sees a key (fourth axis). Each query sees at least itself.

    >>> context_mask(torch.tensor([[0, 0, 1]]))[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    same_document = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (same_document & causal).unsqueeze(1)


def sees_context(document_ids: Tensor, window_starts: Tensor) -> Tensor:
    """Which context tokens a window sees.

    Args:
        document_ids: `[B, S]`, as in `context_mask`.
        window_starts: `[B, N]`, row index of each window's first token (>= 1).

    Returns:
        `[B, N, S]` bool; each window sees at least the token before it.

    >>> sees_context(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 3]]))[0].int()
    tensor([[1, 0, 0, 0],
            [0, 0, 1, 0]], dtype=torch.int32)
    """
    row_index = torch.arange(document_ids.shape[1], device=document_ids.device)
    window_document = document_ids.gather(1, window_starts - 1)
    own_document = document_ids.unsqueeze(1) == window_document.unsqueeze(2)
    return own_document & (row_index < window_starts.unsqueeze(2))


def slot_mask(
    document_ids: Tensor,
    window_starts: Tensor,
    *,
    query_window: Tensor,
    query_offset: Tensor,
    key_window: Tensor,
    key_offset: Tensor,
) -> Tensor:
    """Attention of slots to a cached context that is followed by slots.

    Queries and keys may come in any order (window after window in training, step after step in a rollout), because each
    states its window and its offset within the window.

    Args:
        document_ids: `[B, S]`, as in `context_mask`.
        window_starts: `[B, N]`, row index of each window's first token (>= 1).
        query_window: `[Q]`, window number of each query.
        query_offset: `[Q]`, offset of each query within its window.
        key_window: `[K]`, window number of each slot among the keys.
        key_offset: `[K]`, offset of each slot among the keys.

    Returns:
        `[B, 1, Q, S + K]` bool, true where a query sees a key.
    """
    of_context = sees_context(document_ids, window_starts)[:, query_window]
    same_window = query_window.unsqueeze(1) == key_window
    sees_slot = same_window & (key_offset <= query_offset.unsqueeze(1))  # [Q, K]
    return torch.cat([of_context, sees_slot.expand(document_ids.shape[0], -1, -1)], dim=2).unsqueeze(1)
