"""Lookahead: the slots of a call, in branches that each continue one of its tokens, and what its positions see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Lookahead(NamedTuple):
    """Slots after the T tokens of a call. The slots of a branch follow each other; branches do not see each other.

    Attributes:
        anchors: `[B, S]` int64, index of the token of the call that a slot's branch continues; -1 for padding.
        offsets: `[B, S]` int64, position of a slot in its branch, from 0.

    A call reads the newest token and one drafted token. One slot continues the first of them, two continue the second:

    >>> lookahead = Lookahead.branches([1], [[1, 2]], torch.device("cpu"))
    >>> lookahead.anchors, lookahead.offsets
    (tensor([[0, 1, 1]]), tensor([[0, 0, 1]]))
    """

    anchors: Tensor
    offsets: Tensor

    @classmethod
    def single(cls, counts: Sequence[int], num_slots: int, device: torch.device) -> Lookahead:
        """One branch of `num_slots` slots in each row, after its last token; row b has `counts[b]` tokens."""
        anchors = (torch.tensor(counts, device=device) - 1).unsqueeze(1).expand(-1, num_slots)
        return cls(anchors, torch.arange(num_slots, device=device).expand(len(counts), -1))

    @classmethod
    def branches(cls, counts: Sequence[int], slots: Sequence[Sequence[int]], device: torch.device) -> Lookahead:
        """Several branches: `slots[b][k]` slots continue token `counts[b] - 1 + k` of row b."""
        num_slots = max(map(sum, slots))
        anchors, offsets = [], []
        for count, row in zip(counts, slots, strict=True):
            padding = num_slots - sum(row)
            lengths = torch.tensor([*row, padding])
            first = lengths.cumsum(0) - lengths
            branch = torch.repeat_interleave(lengths)
            offsets.append(torch.arange(num_slots) - first[branch])
            anchors.append((count - 1 + branch).where(branch < len(row), -1))
        return cls(torch.stack(anchors).to(device), torch.stack(offsets).to(device))


def positions_and_mask(
    lengths: Sequence[int],
    num_tokens: int,
    lookahead: Lookahead | None,
    device: torch.device,
    limit: int | None = None,
    ancestors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Position ids and mask of a call with a ragged cache, which reads T tokens and then slots.

    Tokens see the kept tokens of their row and the call's tokens up to themselves, or their ancestors. Slots see the
    kept tokens, the call's tokens up to their branch's anchor, and their own branch up to themselves.

    Args:
        lengths: number of kept tokens of each row.
        num_tokens: T.
        lookahead: of S slots; None for none.
        device: of the results.
        limit: number of positions of the model. Those beyond its last one, whose results are discarded, are set to it.
        ancestors: `[B, T, T]`, of tokens that are a `TokenTree`.

    Returns:
        Position ids `[B, T + S]` and mask `[B, 1, T + S, max(lengths) + T + S]`, true where a query sees a key.
    """
    kept = torch.tensor(lengths, device=device).unsqueeze(1)
    columns = torch.arange(num_tokens, device=device)
    if ancestors is None:
        own = (columns.unsqueeze(1) >= columns).expand(len(lengths), -1, -1)
        position_ids = kept + columns
    else:
        own = ancestors
        position_ids = kept + ancestors.sum(dim=2) - 1
    if lookahead is not None:
        anchors, offsets = lookahead
        position_ids = torch.cat([position_ids, kept + anchors + 1 + offsets], dim=1)
        sees_token = anchors.unsqueeze(2) >= columns
        sees_slot = (anchors.unsqueeze(2) == anchors.unsqueeze(1)) & (offsets.unsqueeze(2) >= offsets.unsqueeze(1))
        own = torch.cat([pad(own, (0, anchors.shape[1])), torch.cat([sees_token, sees_slot], dim=2)], dim=1)
    num_queries = own.shape[1]
    if len(set(lengths)) == 1:
        mask = pad(own, (lengths[0], 0), value=True)
    else:
        keys = torch.arange(max(lengths) + num_queries, device=device) - kept  # index of each key within the call
        mask = own.gather(2, keys.clamp(0, num_queries - 1).unsqueeze(1).expand(-1, num_queries, -1))
        mask = (mask & (keys < num_queries).unsqueeze(1)) | (keys < 0).unsqueeze(1)
    return position_ids if limit is None else position_ids.clamp_max(limit - 1), mask.unsqueeze(1)
