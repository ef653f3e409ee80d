"""DraftHead: the output head of slots, over the tokens of the draft vocabulary alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ptp_lightning.draft_vocabulary import DraftVocabulary
from ptp_lightning.models.layers.quantized_linear import DraftLinear


class DraftHead(nn.Module):
    """Logits for N of the V tokens.

    If the output head is frozen, its rows are copied once, so that decoding can round or pack them. Rows
    of a head that is trained are gathered in every call.

    Args:
        head: the output head, `[V, H]`.
        size: N.

    Attributes:
        rows: a frozen copy of N rows; None if the head is trained.
        is_chosen: whether the tokens come from data or a file; until then they are the first N.
    """

    def __init__(self, head: nn.Module, size: int) -> None:
        super().__init__()
        weight, bias = _weight_and_bias(head)
        self.rows: nn.Linear | None = None
        if not weight.requires_grad:
            options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
            self.rows = DraftLinear(weight.shape[1], size, bias=bias is not None, **options).requires_grad_(False)
        self.is_chosen = False

    @torch.no_grad()
    def gather(self, head: nn.Module, token_ids: Tensor) -> None:
        """Copy the rows of these tokens `[N]`; a collective operation if the head is sharded."""
        if self.rows is None:
            return
        for own, source in zip(_weight_and_bias(self.rows), _weight_and_bias(head), strict=True):
            if own is not None and source is not None:
                whole = source.full_tensor() if isinstance(source, DTensor) else source
                own.copy_(whole[token_ids.long()])

    def forward(self, hidden: Tensor, head: nn.Module, token_ids: Tensor) -> Tensor:
        """Hidden states `[..., H]` to logits `[..., N]` of the tokens `[N]`."""
        if self.rows is not None:
            return self.rows(hidden.to(self.rows.weight.dtype))
        weight, bias = _weight_and_bias(head)
        index = token_ids.long()
        return F.linear(hidden.to(weight.dtype), weight[index], None if bias is None else bias[index])


def require_draft_size(size: int | None, num_tokens: int) -> None:
    """Refuse a draft vocabulary of more than V = `num_tokens` tokens, before anything of its size is built.

    Raises:
        ValueError: names the key.
    """
    if size is not None and size > num_tokens:
        raise ValueError(f"expected predictor.draft_vocabulary null or <= {num_tokens} (all tokens), found {size}")


def require_draft_vocabulary(token_ids: Tensor, size: int, num_tokens: int) -> None:
    """Refuse token ids that are no draft vocabulary of N = `size` of V = `num_tokens` tokens.

    Raises:
        ValueError: they are not N ascending numbers below V.
    """
    ids = token_ids.long().cpu()
    if ids.shape != (size,) or not (ids.diff() > 0).all() or int(ids[0]) < 0 or int(ids[-1]) >= num_tokens:
        raise ValueError(
            f"expected a draft vocabulary of {size} ascending token ids below {num_tokens}, found {ids.numel()} "
            "numbers that are none: it belongs to another base model or is damaged, take another copy of the adapter"
        )


def as_vocabulary(token_ids: Tensor | None) -> DraftVocabulary | None:
    """Stored token ids `[N]` as a vocabulary; None for all tokens."""
    return None if token_ids is None else DraftVocabulary(token_ids.long())


def _weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = head.weight  # pyright: ignore[reportAssignmentType]
    bias: Tensor | None = getattr(head, "bias", None)
    return weight, bias
