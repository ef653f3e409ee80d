"""The two orders in which a draft is corrected in decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def refine_draft(draft: Tensor, num_refinement_steps: int, predict: Callable[[Tensor], Tensor]) -> Tensor:
    """Predict all tokens of a draft but the first again, several times, each time from the draft of the last step.

    Args:
        draft: `[..., L]` token ids, the first exact.
        num_refinement_steps: each predicts L - 1 tokens at once. Step k settles token k + 1, so at most L - 1 are made.
        predict: from the tokens `[..., L - 1]` that slots stand for to the tokens that they predict.

    >>> refine_draft(torch.tensor([1, 0, 0, 0]), 2, lambda token_ids: 2 * token_ids)
    tensor([1, 2, 4, 0])
    """
    for _ in range(min(num_refinement_steps, draft.shape[-1] - 1)):
        draft = torch.cat([draft[..., :1], predict(draft[..., :-1])], dim=-1)
    return draft


def draft_left_to_right(first: Tensor, num_slots: int, predict: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Predict one token after the other, each given the one before it.

    Args:
        first: `[..., 1]` token ids, exact.
        num_slots: J.
        predict: from a slot and the tokens `[..., 1]` that it stands for to the tokens that it predicts.

    Returns:
        `[..., J + 1]`, beginning with `first`.

    >>> draft_left_to_right(torch.tensor([1]), 3, lambda slot, token_ids: 2 * token_ids)
    tensor([1, 2, 4, 8])
    """
    tokens = [first]
    for slot in range(num_slots):
        tokens.append(predict(slot, tokens[-1]))
    return torch.cat(tokens, dim=-1)
