"""Penalties of the tokens that a text contains already: functions of the verified prefix, so that texts stay exact.

They are those of transformers, over the prompt and the new tokens alike, and change the base model's logits before
temperature, top-k, top-p and min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptp_lightning.sampling import SamplingConfig


class PrefixPenalties:
    """The penalties of B texts, and their tokens so far.

    Args:
        settings: with penalties.
        num_rows: B.
        device: of the token ids.
    """

    def __init__(self, settings: SamplingConfig, num_rows: int, device: torch.device) -> None:
        self._settings = settings
        self._prefixes = [torch.empty(0, dtype=torch.long, device=device) for _ in range(num_rows)]

    @classmethod
    def of(cls, settings: SamplingConfig, num_rows: int, device: torch.device) -> PrefixPenalties | None:
        """The penalties of these settings; None if there are none."""
        return cls(settings, num_rows, device) if settings.depends_on_prefix else None

    def keep(self, token_ids: Tensor, counts: Sequence[int]) -> None:
        """Append the first `counts[b]` of token ids `[B, T]` to the text of row b."""
        rows = zip(self._prefixes, token_ids, counts, strict=True)
        self._prefixes = [torch.cat([prefix, row[:count]]) for prefix, row, count in rows]

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put these in this order."""
        self._prefixes = [self._prefixes[row] for row in rows]

    def penalized(self, logits: Tensor, token_ids: Tensor, firsts: Sequence[int]) -> Tensor:
        """Logits `[B, J, V]` in float32 or better, of the tokens after columns `firsts[b]`, `firsts[b] + 1`, ..

        Args:
            logits: `[B, J, V]`, as the model computes them.
            token_ids: `[B, T]`, tokens that follow the kept ones; column `firsts[b] + j` is the last before logits j.
            firsts: a column of each row.
        """
        rows = zip(self._prefixes, token_ids, firsts, logits, strict=True)
        return torch.stack(
            [
                torch.stack(
                    [
                        penalized(one, torch.cat([prefix, row[: first + j + 1]]), self._settings)
                        for j, one in enumerate(of_row)
                    ]
                )
                for prefix, row, first, of_row in rows
            ]
        )

    def penalized_slots(self, logits: Tensor, first: Tensor, columns: Tensor | None) -> Tensor:
        """Slot logits `[B, J, N]` with the repetition penalty of the kept tokens and the first drafted one.

        Drafts may be wrong, so the other drafted tokens and repeated n-grams are left out.

        Args:
            logits: of slots.
            first: `[B, 1]`, the token after the kept ones.
            columns: `[N]`, the tokens that the columns stand for; None for the whole vocabulary.
        """
        penalty = self._settings.repetition_penalty or 1.0
        size = logits.shape[-1] if columns is None else int(columns.max()) + 1
        rows = zip(self._prefixes, first, logits, strict=True)
        contained = [_contained(torch.cat([prefix, row]), size) for prefix, row, _ in rows]
        listed = torch.stack([one if columns is None else one[columns] for one in contained])
        return torch.where(listed.unsqueeze(1), _lowered(logits, penalty), logits)


def penalized(logits: Tensor, prefix: Tensor, settings: SamplingConfig) -> Tensor:
    """Logits `[V]` after a prefix of token ids `[n]`, in float32 or better.

    >>> settings = SamplingConfig(repetition_penalty=2.0)
    >>> penalized(torch.tensor([4.0, -1.0, 3.0]), torch.tensor([1, 0, 1]), settings)
    tensor([ 2., -2.,  3.])
    >>> penalized(torch.tensor([4.0, -1.0, 3.0]), torch.tensor([1, 0, 1]), SamplingConfig(no_repeat_ngram_size=2))
    tensor([-inf, -1.,  3.])
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.repetition_penalty not in (None, 1):
        logits = logits.where(~_contained(prefix, len(logits)), _lowered(logits, settings.repetition_penalty))
    if (size := settings.no_repeat_ngram_size or 0) and len(prefix) >= size:
        ngrams = prefix.unfold(0, size, 1)
        is_repeated = (ngrams[:, :-1] == prefix[len(prefix) - size + 1 :]).all(1)
        logits = logits.index_fill(0, ngrams[is_repeated, -1], -torch.inf)
    return logits


def _contained(token_ids: Tensor, vocab_size: int) -> Tensor:
    """`[V]` bool: the tokens among these token ids `[n]`; larger ids are ignored."""
    contained = torch.zeros(vocab_size + 1, dtype=torch.bool, device=token_ids.device)
    contained[token_ids.clamp_max(vocab_size)] = True
    return contained[:-1]


def _lowered(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits < 0, logits * penalty, logits / penalty)
