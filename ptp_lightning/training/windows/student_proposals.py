"""What the student proposes for the windows of a batch, and what the base model says along given tokens; no gradients.

Logits of all slots never exist at once: they are made and used up chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.auxiliary_strategies import StudentAnswer, StudentProbe
from ptp_lightning.distributions import Distributions, LazyDistributions
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.refiner.refiner import refine_draft
from ptp_lightning.sampling import TokenDistribution

CHUNK_SLOTS = 1024  # slots whose logits exist at the same time

_Result = TypeVar("_Result")

DistributionPair = tuple[Distributions, Distributions]
"""What tokens are picked from, and what students learn."""


class StudentDraft(NamedTuple):
    """Windows as the student proposes them.

    Attributes:
        token_ids: `[B, N, L]` int64.
        hidden: `[B, N, L - 1, H]`, the slots' last hidden states that predict all but the first token.
    """

    token_ids: Tensor
    hidden: Tensor


@torch.no_grad()
def student_draft(
    predictor: PredictorNetwork, context: Context, auxiliaries: Tensor, first_token_ids: Tensor
) -> StudentDraft:
    """Let the student propose windows as it does in decoding: one pass over all slots, then the refiner's rounds.

    Args:
        predictor: base model and student; its dropout is off here.
        context: of `predictor.encode`.
        auxiliaries: `[B, N, L]` float64 in [0, 1).
        first_token_ids: `[B, N]`, the base model's own picks.
    """
    objective, sampling = predictor.config.objective, context.sampling

    def picks(states: Tensor) -> Tensor:
        chunks = _by_chunk(
            lambda chunk, u: objective.tokens_from_logits(predictor.slot_logits(chunk).float(), u, sampling),
            states.flatten(0, 2),
            auxiliaries[..., 1:].flatten(),
        )
        return torch.cat(chunks).view_as(auxiliaries[..., 1:])

    with _without_dropout(predictor):
        slots = hidden = predictor.slot_hidden(context, auxiliaries)
        draft = torch.cat([first_token_ids.unsqueeze(-1), picks(hidden)], dim=-1)
        if predictor.refiner is not None:
            pairs = predictor.refiner_context(context)

            def predict_again(token_ids: Tensor) -> Tensor:
                nonlocal hidden
                hidden = predictor.refine(context, pairs, slots, token_ids)
                return picks(hidden)

            draft = refine_draft(draft, predictor.num_refinement_steps, predict_again)
    return StudentDraft(draft, hidden)


def student_probe(predictor: PredictorNetwork, context: Context, token_ids: Tensor) -> StudentProbe:
    """Ask the student about given windows.

    A refiner is told the given tokens, as in training: what comes after a wrong token of a draft is of no use.

    Args:
        predictor: base model and student.
        context: of `predictor.encode`.
        token_ids: `[B, N, L]` int64, the given tokens.
    """

    def answer(hidden: Tensor, u: Tensor, tokens: Tensor) -> StudentAnswer:
        objective, sampling = predictor.config.objective, context.sampling
        logits = predictor.slot_logits(hidden).float()
        correct = objective.tokens_from_logits(logits, u, sampling) == tokens
        if not objective.predicts_distribution:
            return StudentAnswer(correct, None)
        return StudentAnswer(correct, token_interval(sampling.proposal().distribution(logits), tokens))

    @torch.no_grad()
    def ask(auxiliaries: Tensor) -> StudentAnswer:
        with _without_dropout(predictor):
            hidden = predictor.slot_hidden(context, auxiliaries)
            if predictor.refiner is not None:
                pairs = predictor.refiner_context(context)
                hidden = predictor.refine(context, pairs, hidden, token_ids[..., :-1])
        later = token_ids[..., 1:]
        answers = _by_chunk(answer, hidden.flatten(0, 2), auxiliaries[..., 1:].flatten(), later.flatten())

        def with_first(value: float, chunks: list[Tensor]) -> Tensor:
            return torch.nn.functional.pad(torch.cat(chunks).view_as(later), (1, 0), value=value)

        # The first token is the base model's pick: right wherever u lies.
        correct = with_first(True, [entry.correct for entry in answers])
        intervals = [entry.interval for entry in answers if entry.interval is not None]
        if not intervals:
            return StudentAnswer(correct, None)
        lower = with_first(0.0, [ends[0] for ends in intervals])
        upper = with_first(1.0, [ends[1] for ends in intervals])
        return StudentAnswer(correct, (lower, upper))

    return ask


def are_lazy(predictor: PredictorNetwork, context: Context) -> bool:
    """Whether distributions are made when they are needed: over a whole vocabulary. A few candidates are kept."""
    return context.sampling.settings.lists_all(predictor.base_model.config.vocab_size)


def lazily(predictor: PredictorNetwork, context: Context, hidden: Tensor) -> DistributionPair:
    """What the base model's hidden states `[..., H]` say comes next, as teacher and target."""
    teacher = LazyDistributions(hidden, predictor.logits, context.sampling)
    return teacher, replace(teacher, is_target=True)


@torch.no_grad()
def distributions_along(predictor: PredictorNetwork, context: Context, token_ids: Tensor) -> DistributionPair:
    """The base model's distributions along given windows, in one parallel pass with the gate closed.

    Args:
        predictor: the base model.
        context: of `predictor.encode`.
        token_ids: `[B, N, L]` int64; the last token of each window is not read.

    Returns:
        Teacher and target at every position, `[B, N, L]` each: that at k follows the tokens before k. Distributions
        over a whole vocabulary are lazy.
    """
    read = token_ids.shape[2] - 1
    sampling = context.sampling
    with predictor.gate.closed():
        hidden = predictor.window_reader(context).read(predictor.run_decoder, predictor.embed(token_ids[..., :-1]))
    if are_lazy(predictor, context):
        return lazily(predictor, context, torch.cat([context.first_hidden.unsqueeze(2), hidden], dim=2))
    # Position 0 is computed for itself, as everywhere else, so that rounding gives the same token everywhere.
    first = sampling.teacher_and_target(predictor.logits(context.first_hidden))
    chunks = _by_chunk(lambda chunk: sampling.teacher_and_target(predictor.logits(chunk)), hidden.flatten(0, 2))
    teacher, target = (_concatenate(first[which], [chunk[which] for chunk in chunks], read) for which in range(2))
    return teacher, target


def _concatenate(first: TokenDistribution, later: list[TokenDistribution], read: int) -> TokenDistribution:
    """`[B, N, K]` at position 0 and chunks of `[B * N * J, K]` behind it: `[B, N, J + 1, K]`."""

    def join(head: Tensor, chunks: list[Tensor]) -> Tensor:
        return torch.cat([head.unsqueeze(2), torch.cat(chunks).view(*head.shape[:2], read, -1)], dim=2)

    ids = [entry.token_ids for entry in later if entry.token_ids is not None]
    return TokenDistribution(
        join(first.probabilities, [entry.probabilities for entry in later]),
        None if first.token_ids is None else join(first.token_ids, ids),
    )


def _by_chunk(function: Callable[..., _Result], *rows: Tensor) -> list[_Result]:
    """The results for `CHUNK_SLOTS` rows at a time."""
    return [function(*chunk) for chunk in zip(*(tensor.split(CHUNK_SLOTS) for tensor in rows), strict=True)]


@contextmanager
def _without_dropout(predictor: PredictorNetwork) -> Iterator[None]:
    mode = predictor.training
    predictor.eval()
    try:
        yield
    finally:
        predictor.train(mode)
