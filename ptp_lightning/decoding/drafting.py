"""Drafts: the tokens that the slots of a call predict, after correction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.decoding.text_drafts import StudentTokens
from ptp_lightning.decoding.token_tree import TokenTree, TreeLevel, best_tree
from ptp_lightning.models.correction.correction import CorrectionHead
from ptp_lightning.models.correction.draft_order import draft_left_to_right, refine_draft
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.sampling import Sampler

NUM_DRAFT_TOKENS = 8
"""Of the default tree. More tokens are correct more often, but reading them takes longer on a CPU."""
BEAM = 8  # paths that are continued at each depth
CHOICES = 4  # tokens that may continue a path
SMALLEST_PROBABILITY = 1e-12  # of a choice, so that its logarithm is finite
WORTHWHILE_PROBABILITY = 0.1
"""A drafted token that is correct with less than this probability takes longer to verify, on a CPU, than it saves."""


class Drafter(Protocol):
    """Chooses drafted tokens from slot logits. Any tokens are allowed; correct ones save calls."""

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """Tokens `starts[b]` .. `starts[b] + J - 1` of the new text of each row.

        Args:
            slot_logits: `[B, J, N]`, J >= 1, of the tokens that slots can draft.
            auxiliaries: `[B, J]`, of the drafted tokens.
            starts: number of new tokens of each row before the first drafted one.

        Returns:
            `[B, J]` int64.
        """
        ...


@runtime_checkable
class TreeDrafter(Drafter, Protocol):
    """Chooses several tokens for a slot, too."""

    def likely(
        self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        """The likeliest tokens and their probabilities, each `[B, J, C]`, C <= `count`; see `Drafter`."""
        ...


@dataclass(frozen=True)
class StudentDrafter:
    """The tokens that the student's objective reads from slot logits.

    Args:
        objective: of the predictor.
        sampling: of the text.
    """

    objective: Objective
    sampling: Sampler

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """See `Drafter`."""
        return self.objective.tokens_from_logits(slot_logits.float(), auxiliaries, self.sampling)

    def likely(
        self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        """See `TreeDrafter`."""
        return self.objective.likely_tokens(slot_logits.float(), auxiliaries, self.sampling, count)


def num_tree_tokens(predictor: PredictorNetwork, settings: GenerationSettings) -> int:
    """Number of drafted tokens of a tree; 0 for a single draft.

    In a tree, each token may depend on its slot and on the token before it alone. So there is none with a correction in
    parallel steps, or with penalties of earlier tokens. Unless `settings` say how many, there are `NUM_DRAFT_TOKENS` on
    a CPU where a slot knows the token before, by a correction or because it runs through no layer, and a single draft
    elsewhere.
    """
    depends_on_more = predictor.correction is not None and not predictor.corrects_left_to_right
    if depends_on_more or settings.sampling.depends_on_prefix:
        return 0
    if settings.num_draft_tokens is not None:
        return settings.num_draft_tokens
    knows_token_before = predictor.corrects_left_to_right or predictor.config.slot_layers == 0
    return NUM_DRAFT_TOKENS if knows_token_before and predictor.base_model.device.type == "cpu" else 0


def draft_trees(
    context: BatchContext, drafter: TreeDrafter, first: Tensor, slots: Tensor, starts: Sequence[int], size: int
) -> TokenTree:
    """Draft several continuations of each row: the `size` tokens that are likeliest to be correct.

    Depth by depth, the `BEAM` likeliest tokens are continued, each by `CHOICES` others.

    Args:
        context: the texts, of which `num_tree_tokens` is positive.
        drafter: chooses the tokens.
        first: see `draft_windows`.
        slots: `[B, J, H]`, likewise; no path has more than J tokens after the first.
        starts: likewise.
        size: number of drafted tokens after the first.
    """
    nodes = torch.zeros_like(first)  # index of each path's end among all candidates; the root is the first of them
    levels: list[TreeLevel] = []
    num_nodes = 1
    for beam in _beams(context, drafter, first, slots, starts):
        parents = nodes.unsqueeze(2).expand(beam.token_ids.shape).flatten(1)
        levels.append(TreeLevel(beam.token_ids.flatten(1), beam.scores, parents))
        nodes, num_nodes = num_nodes + beam.continued, num_nodes + beam.scores.shape[1]
    if not levels:
        return TokenTree.chain(first)
    return best_tree(first, levels, min(size, sum(_num_worthwhile(level.scores) for level in levels)))


def likely_tokens(
    context: BatchContext, drafter: TreeDrafter, first: Tensor, slots: Tensor, starts: Sequence[int]
) -> list[StudentTokens]:
    """The candidates of `draft_trees` for each row, by the path after the first token that they follow.

    Waits for the device. Arguments are the same.
    """
    found: list[dict[tuple[int, ...], list[tuple[int, float]]]] = [{} for _ in starts]
    paths: list[list[tuple[int, ...]]] = [[()] for _ in starts]
    for beam in _beams(context, drafter, first, slots, starts):
        all_ids, all_probabilities = beam.token_ids.tolist(), beam.probabilities.tolist()
        for row, continued in enumerate(beam.continued.tolist()):
            token_ids = all_ids[row]
            for path, tokens, probabilities in zip(paths[row], token_ids, all_probabilities[row], strict=True):
                found[row][path] = list(zip(tokens, probabilities, strict=True))
            choices = [(*path, token) for path, tokens in zip(paths[row], token_ids, strict=True) for token in tokens]
            paths[row] = [choices[index] for index in continued]
    return list(found)


class _Beam(NamedTuple):
    """The candidates of one depth: C tokens after each of W paths.

    Attributes:
        token_ids: `[B, W, C]`.
        probabilities: `[B, W, C]`, of each after its path.
        scores: `[B, W * C]` float64, log probability of each path with its token.
        continued: `[B, W']`, indices of those that are paths of the next depth.
    """

    token_ids: Tensor
    probabilities: Tensor
    scores: Tensor
    continued: Tensor


def _beams(
    context: BatchContext, drafter: TreeDrafter, first: Tensor, slots: Tensor, starts: Sequence[int]
) -> Iterator[_Beam]:
    """Depth by depth, until no candidate is worth its time."""
    num_slots = slots.shape[1]
    auxiliaries = context.auxiliaries([start + 1 for start in starts], num_slots)
    next_logits = _next_logits(context, slots, first)
    ends = first
    scores = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    for slot in range(num_slots):
        logits = next_logits(slot, ends)
        u = auxiliaries[:, slot : slot + 1].expand(ends.shape)
        token_ids, probabilities = drafter.likely(logits, u, [start + 1 + slot for start in starts], CHOICES)
        candidates = scores.unsqueeze(2) + probabilities.double().clamp_min(SMALLEST_PROBABILITY).log()
        candidates = candidates.flatten(1)
        width = min(BEAM, _num_worthwhile(candidates)) if slot + 1 < num_slots else 0
        scores, continued = candidates.topk(width, dim=1)
        yield _Beam(token_ids, probabilities, candidates, continued)
        if width == 0:
            return
        ends = token_ids.flatten(1).gather(1, continued)


def _num_worthwhile(scores: Tensor) -> int:
    """How many candidates `[B, C]` of a row are worth the time of verifying them, in the row with most of them.

    On a GPU all are: a position more costs little there, and waiting for this number costs more.
    """
    if scores.device.type != "cpu":
        return scores.shape[1]
    return int((scores > log(WORTHWHILE_PROBABILITY)).sum(dim=1).max())


def draft_windows(
    context: BatchContext, drafter: Drafter, first: Tensor, slots: Tensor, starts: Sequence[int]
) -> Tensor:
    """Draft a window after the kept tokens of each row; its first token is exact.

    Args:
        context: the texts.
        drafter: chooses the tokens.
        first: `[B, 1]`, the base model's own picks.
        slots: `[B, J, H]`, last hidden states of slots that stand for the first token and the tokens after it.
        starts: number of new tokens of each row before the first.

    Returns:
        Token ids `[B, J + 1]`.
    """
    num_slots = slots.shape[1]
    if num_slots == 0:
        return first
    predictor = context.predictor
    drafted = [start + 1 for start in starts]
    auxiliaries = context.auxiliaries(drafted, num_slots)
    if predictor.corrects_left_to_right:
        next_logits = _next_logits(context, slots, first)

        def predict_next(slot: int, token_ids: Tensor) -> Tensor:
            logits = next_logits(slot, token_ids)
            return drafter(logits, auxiliaries[:, slot : slot + 1], [start + slot for start in drafted])

        return draft_left_to_right(first, num_slots, predict_next)

    def slot_logits(hidden: Tensor) -> Tensor:
        return context.penalized_slots(predictor.slot_logits(hidden), first)

    def predict_again(token_ids: Tensor) -> Tensor:
        return drafter(slot_logits(context.correct(slots, token_ids)), auxiliaries, drafted)

    draft = torch.cat([first, drafter(slot_logits(slots), auxiliaries, drafted)], dim=1)
    return refine_draft(draft, predictor.num_refinement_steps, predict_again)


def _next_logits(context: BatchContext, slots: Tensor, first: Tensor) -> Callable[[int, Tensor], Tensor]:
    """From slot j and W tokens `[B, W]` that it may stand for to its logits after each of them, `[B, W, N]`.

    Args:
        context: of a predictor without a correction, or with one that runs from left to right.
        slots: see `draft_windows`.
        first: likewise.
    """
    predictor = context.predictor
    if predictor.correction is None:
        all_logits = predictor.slot_logits(slots)
        return lambda slot, token_ids: all_logits[:, slot : slot + 1].expand(-1, token_ids.shape[1], -1)
    assert isinstance(predictor.correction, CorrectionHead), "no other correction runs from left to right"
    corrected = predictor.correction.next_logits(slots, predictor.slot_logits)
    return lambda slot, token_ids: context.penalized_slots(corrected(slot, predictor.embed(token_ids)), first)
