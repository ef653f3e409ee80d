"""Teacher and target distributions along windows, from the base model's hidden states; no gradients.

Distributions over a whole vocabulary are lazy: their logits never exist all at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ptp_lightning.distributions import Distributions, LazyDistributions
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.windows.chunks import map_chunks

TeacherAndTarget = tuple[Distributions, Distributions]
"""The distributions that tokens are picked from, and those that students learn."""


class RolloutDistributions:
    """Teacher and target of windows whose L positions become known one after the other."""

    def __init__(self, predictor: PredictorNetwork, context: Context) -> None:
        self._predictor = predictor
        self._context = context
        self._is_lazy = are_lazy(predictor, context)
        self._hidden: list[Tensor] = []
        self._pairs: list[tuple[TokenDistribution, TokenDistribution]] = []

    def add(self, hidden: Tensor) -> TokenDistribution:
        """The teacher at the next position, `[B, N]`, from hidden states `[B, N, H]`."""
        logits = self._predictor.logits(hidden)
        if self._is_lazy:
            self._hidden.append(hidden)
            return self._context.sampling.distribution(logits)
        self._pairs.append(self._context.sampling.teacher_and_target(logits))
        return self._pairs[-1][0]

    def teacher_and_target(self) -> TeacherAndTarget:
        """Both at all positions, `[B, N, L]`."""
        if self._is_lazy:
            return lazy_distributions(self._predictor, self._context, torch.stack(self._hidden, dim=2))
        teachers, targets = zip(*self._pairs, strict=True)
        return stack_positions(teachers), stack_positions(targets)


def are_lazy(predictor: PredictorNetwork, context: Context) -> bool:
    """Whether distributions are computed when needed, because they cover the whole vocabulary."""
    return context.sampling.settings.keeps_all_tokens(predictor.base_model.config.vocab_size)


def lazy_distributions(predictor: PredictorNetwork, context: Context, hidden: Tensor) -> TeacherAndTarget:
    """Teacher and target `[...]` from the base model's hidden states `[..., H]`, computed when needed."""
    teacher = LazyDistributions(hidden, predictor.logits, context.sampling)
    return teacher, replace(teacher, is_target=True)


@torch.no_grad()
def distributions_along(predictor: PredictorNetwork, context: Context, token_ids: Tensor) -> TeacherAndTarget:
    """Teacher and target along given windows, in one parallel pass with the gate closed.

    Args:
        predictor: the base model.
        context: of `predictor.encode`.
        token_ids: `[B, N, L]` int64; the last token of each window is not read.

    Returns:
        `[B, N, L]` each; the distributions at position k are conditioned on the tokens before k.
    """
    length = token_ids.shape[2]
    sampling = context.sampling
    with predictor.gate.closed():
        hidden = predictor.read_windows(context, predictor.embed(token_ids[..., :-1]))
    if are_lazy(predictor, context):
        return lazy_distributions(predictor, context, torch.cat([context.first_hidden.unsqueeze(2), hidden], dim=2))
    # Position 0 is computed by itself, as everywhere else, so that rounding gives the same token everywhere.
    first = sampling.teacher_and_target(predictor.logits(context.first_hidden))
    chunks = map_chunks(lambda chunk: sampling.teacher_and_target(predictor.logits(chunk)), hidden.flatten(0, 2))
    teacher, target = (_join(first[which], [chunk[which] for chunk in chunks], length) for which in range(2))
    return teacher, target


def stack_positions(distributions: Iterable[TokenDistribution]) -> TokenDistribution:
    """Distributions `[B, N, K]` of L positions as one `[B, N, L, K]`."""
    distributions = list(distributions)
    probabilities = torch.stack([entry.probabilities for entry in distributions], dim=2)
    ids = [entry.token_ids for entry in distributions if entry.token_ids is not None]
    return TokenDistribution(probabilities, torch.stack(ids, dim=2) if ids else None)


def _join(first: TokenDistribution, chunks: list[TokenDistribution], length: int) -> TokenDistribution:
    """`[B, N, K]` at position 0, and chunks of the later positions `[B * N * (L - 1), K]`: `[B, N, L, K]`."""

    def join(head: Tensor, later: list[Tensor]) -> Tensor:
        return torch.cat([head.unsqueeze(2), torch.cat(later).view(*head.shape[:2], length - 1, -1)], dim=2)

    ids = [chunk.token_ids for chunk in chunks if chunk.token_ids is not None]
    return TokenDistribution(
        join(first.probabilities, [chunk.probabilities for chunk in chunks]),
        None if first.token_ids is None else join(first.token_ids, ids),
    )
