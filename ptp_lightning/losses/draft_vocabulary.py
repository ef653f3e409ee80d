"""Losses of slots that can draft a part of the vocabulary: of its columns alone, never of all tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ptp_lightning.draft_vocabulary import DraftVocabulary
from ptp_lightning.losses.base import Loss
from ptp_lightning.losses.mixture import MixedLoss
from ptp_lightning.sampling import TokenDistribution


@dataclass(frozen=True, eq=False, kw_only=True)
class DraftVocabularyLoss(Loss):
    """A loss of logits `[m, N]` of the tokens that slots can draft.

    What slots cannot draft is dropped. A loss that compares with a token counts where the vocabulary has this token. A
    loss that compares with a distribution Q counts with the mass m that Q has in the vocabulary, and compares with
    Q / m: a Kullback-Leibler divergence becomes m times the divergence from Q / m, whose gradient is `m P - Q`.

    Args:
        loss: of a whole vocabulary; no `MixedLoss`, see `over_draft_vocabulary`.
        vocabulary: the tokens of the columns.
    """

    loss: Loss
    vocabulary: DraftVocabulary

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("needs_target", "sound_for", "unsound_because"):  # constants of other losses; frozen
            object.__setattr__(self, name, getattr(self.loss, name))

    def per_slot(self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None) -> Tensor:
        """See `Loss.per_slot`; `token_ids` and `target` are those of the whole vocabulary."""
        columns, restricted, weight = self._mapped(token_ids, target)
        return self.loss.per_slot(logits, columns, restricted) * weight.to(logits.dtype)

    def with_gradients(
        self, logits: Tensor, token_ids: Tensor, target: TokenDistribution | None, out: Tensor
    ) -> Tensor:
        """See `Loss.with_gradients`."""
        columns, restricted, weight = self._mapped(token_ids, target)
        nats = self.loss.with_gradients(logits, columns, restricted, out)
        weight = weight.to(logits.dtype)
        out.mul_(weight.unsqueeze(-1))
        return nats * weight

    def _mapped(
        self, token_ids: Tensor, target: TokenDistribution | None
    ) -> tuple[Tensor, TokenDistribution | None, Tensor]:
        """Columns `[m]`, the target over columns, and the weight `[m]` of each slot."""
        columns, found = self.vocabulary.columns(token_ids)
        if not self.loss.needs_target or target is None:
            return columns, None, found
        restricted = self.vocabulary.restrict(*target)
        return columns, TokenDistribution(restricted.probabilities, restricted.columns), restricted.mass


def over_draft_vocabulary(loss: Loss, vocabulary: DraftVocabulary | None) -> Loss:
    """A loss for logits of a draft vocabulary, unchanged where that is None.

    The terms of a mixture are mapped one by one.

    >>> import torch
    >>> from ptp_lightning.losses import CrossEntropy
    >>> loss = over_draft_vocabulary(CrossEntropy(), DraftVocabulary(torch.tensor([2, 5])))
    >>> loss.per_slot(torch.zeros(2, 2), torch.tensor([5, 6]), None)  # log 2; token 6 cannot be drafted
    tensor([0.6931, 0.0000])
    """
    if vocabulary is None:
        return loss
    if isinstance(loss, MixedLoss):
        terms = [replace(term, loss=over_draft_vocabulary(term.loss, vocabulary)) for term in loss.terms]
        return replace(loss, terms=terms)
    return DraftVocabularyLoss(chunk_size=loss.chunk_size, loss=loss, vocabulary=vocabulary)
