"""DraftVocabulary: the tokens that slots can draft, if these are not all; and how everything else is mapped to them.

Slots of such a predictor have logits for N tokens instead of V. The maps are here; they are used in three places:

* Drafts and their metrics: distributions of `Sampler.for_student` list token ids, not columns. So a correct token
  outside of the vocabulary counts as drafted wrongly, and has no perplexity.
* Losses: `over_draft_vocabulary` restricts the reference tokens and the teacher's distributions.
* Logits: `DraftHead` has the rows of the output head.

Verification knows nothing of this. It reads the base model's logits for all V tokens, so texts do not depend on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RestrictedTarget(NamedTuple):
    """Distributions over the tokens of a draft vocabulary.

    Attributes:
        probabilities: `[..., K]`, each row sums to 1; 0 marks tokens that are outside or were removed before.
        columns: `[..., K]` int64, no column twice in a row; None means that K = N and entry k is column k.
        mass: `[...]`, probability of the vocabulary before normalisation.
    """

    probabilities: Tensor
    columns: Tensor | None
    mass: Tensor


@dataclass(frozen=True)
class DraftVocabulary:
    """N of the V tokens.

    Args:
        token_ids: `[N]` int64, ascending.

    >>> vocabulary = DraftVocabulary(torch.tensor([2, 5, 7]))
    >>> vocabulary.columns(torch.tensor([5, 6]))  # token 6 is outside; its column stands for nothing
    (tensor([1, 2]), tensor([ True, False]))
    """

    token_ids: Tensor

    def columns(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of tokens `[...]`, int64, and whether the vocabulary has them; any column where it has not."""
        columns = torch.searchsorted(self.token_ids, token_ids.contiguous()).clamp_max(len(self.token_ids) - 1)
        return columns, self.token_ids[columns] == token_ids

    def restrict(self, probabilities: Tensor, token_ids: Tensor | None) -> RestrictedTarget:
        """Drop what is outside of the vocabulary, and normalise the rest.

        Rows without any token of the vocabulary have mass 0, and any distribution.

        Args:
            probabilities: `[m, K]`.
            token_ids: `[m, K]`; None means that K = V and entry k is token k.

        >>> vocabulary = DraftVocabulary(torch.tensor([2, 5, 7]))
        >>> P, columns, mass = vocabulary.restrict(torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([[4, 5, 7]]))
        >>> P, columns, mass
        (tensor([[0.0000, 0.6667, 0.3333]]), tensor([[0, 1, 2]]), tensor([0.7500]))
        """
        columns = None
        if token_ids is None:
            kept = probabilities[:, self.token_ids]
        else:
            columns, found = self.columns(token_ids)
            kept = probabilities * found
            if probabilities.shape[1] <= len(self.token_ids):
                columns = _without_duplicates(columns, found, len(self.token_ids))
            else:
                kept = kept.new_zeros(len(kept), len(self.token_ids)).scatter_add_(1, columns, kept)
                columns = None
        mass = kept.sum(-1, keepdim=True)
        normalised = torch.where(mass > 0, kept / mass, 1 / kept.shape[1])
        return RestrictedTarget(normalised, columns, mass.squeeze(-1))


def most_frequent_tokens(texts: Iterable[Sequence[int]], size: int, vocab_size: int) -> Tensor:
    """The most frequent token ids, `[size]` int64, ascending; of equally frequent ones the lower ids.

    Args:
        texts: token ids.
        size: N.
        vocab_size: V; where texts have fewer different tokens than N, the lowest other ids are added.

    >>> most_frequent_tokens([[7, 7, 5], [5, 3]], size=3, vocab_size=10)
    tensor([3, 5, 7])
    >>> most_frequent_tokens([[7, 7, 5]], size=3, vocab_size=10)
    tensor([0, 5, 7])
    """
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(range(vocab_size), key=lambda token_id: (-counts[token_id], token_id))
    return torch.tensor(sorted(ranked[:size]))


def first_tokens(texts: Iterable[Sequence[int]], limit: int) -> Iterator[Sequence[int]]:
    """Texts until they have `limit` tokens or more in total.

    >>> list(first_tokens([[1, 2], [3, 4], [5]], limit=3))
    [[1, 2], [3, 4]]
    """
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= limit:
            return


def _without_duplicates(columns: Tensor, found: Tensor, num_columns: int) -> Tensor:
    """Columns `[m, K]`, where those of tokens that were not found become columns that the row does not use."""
    num_rows, num_listed = columns.shape
    candidates = min(2 * num_listed, num_columns)
    is_used = torch.zeros(num_rows, candidates + 1, dtype=torch.bool, device=columns.device)
    is_used.scatter_(1, columns.where(found, candidates).clamp_max(candidates), True)
    free = is_used[:, :candidates].to(torch.int8).argsort(dim=1, stable=True)
    number = (~found).cumsum(1) - 1  # of each token that was not found
    return torch.where(found, columns, free.gather(1, number.clamp_min(0)))
