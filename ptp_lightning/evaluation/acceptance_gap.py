"""The acceptance gap: how many correct tokens drafts lose between validation and decoding.

Validation measures drafts at random positions of held-out texts. A decoder makes drafts where the previous draft was
rejected. Drafts at all positions of the decoded texts separate the two causes of a difference: other texts, and
difficult positions. These, and those of validation, are single drafts; a decoder with trees of drafts also gains the
tokens of second choices, so measure the gap with `--num_draft_tokens 0`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ptp_lightning.decoding.drafting import StudentDrafter, draft_windows
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.state import begin_decoding
from ptp_lightning.evaluation.decoder_names import SPECULATIVE
from ptp_lightning.evaluation.records import ALL_POSITIONS, Record
from ptp_lightning.models.network import PredictorNetwork

CONTEXT_BIN_STARTS = (0, 32, 64, 128, 256, 512, 1024, 2048)


@torch.inference_mode()
def correct_tokens_at_all_positions(
    predictor: PredictorNetwork, prompt: Sequence[int], text: Sequence[int], settings: GenerationSettings
) -> list[int]:
    """Number of correct tokens of a draft at each position of a text.

    Args:
        predictor: in eval mode.
        prompt: token ids before the text.
        text: token ids that the base model samples with these settings.
        settings: of the text; drafts have `window_length` tokens.

    Returns:
        One number per position, 1 .. `window_length`, including the exact first token, for all positions at which a
        complete draft fits; the first draft starts with the first token of the text.
    """
    length = settings.window_length
    num_correct: list[torch.Tensor] = []
    with begin_decoding(predictor, [prompt], settings) as (context, _, unread, counts):
        drafter = StudentDrafter(predictor.config.objective, context.sampling)
        known = torch.tensor([list(text)], device=context.device)
        for start in range(len(text) - length + 1):
            first = known[:, start : start + 1]
            if predictor.first_slot_layer:
                context.read(unread)
                context.keep(counts)
                slots = context.late_slots(first, length - 1)
            else:
                _, slots = context.read(unread, Lookahead.single(counts, length - 1, context.device))
                context.keep(counts)
            draft = draft_windows(context, drafter, first, slots, [start])
            is_correct = draft == known[:, start : start + length]
            num_correct.append(is_correct.cumprod(dim=1).sum())
            unread, counts = known[:, start : start + 1], [1]
    return torch.stack(num_correct).tolist() if num_correct else []


@dataclass(frozen=True)
class ContextBin:
    """Mean correct tokens of drafts after `first` to `last` tokens of context.

    Attributes:
        first: smallest number of tokens.
        last: largest number of tokens; None for no limit.
        all_positions: mean over all positions; None without drafts.
        draft_positions: mean over the positions of drafts of speculative decoding; None without drafts.
    """

    first: int
    last: int | None
    all_positions: float | None
    draft_positions: float | None


@dataclass(frozen=True)
class AcceptanceGap:
    """Probability that at least 1, 2, .. L tokens of a draft are correct, at one temperature.

    Attributes:
        temperature: of the sampling.
        validation: on held-out windows, stored with the predictor; None if it was not stored, or if the predictor was
            trained for another temperature.
        all_positions: at all positions of the decoded texts.
        draft_positions: at the positions of complete drafts of speculative decoding; None if it was not run.
        by_context: mean correct tokens by length of the context.
    """

    temperature: float
    validation: list[float] | None
    all_positions: list[float]
    draft_positions: list[float] | None
    by_context: list[ContextBin]


def acceptance_gaps(
    records: Iterable[Record],
    window_length: int,
    prefix_counts: Sequence[int] | None,
    trained_temperature: float | None,
) -> list[AcceptanceGap]:
    """The gap at each temperature.

    Args:
        records: including those of `ALL_POSITIONS`.
        window_length: L, length of complete drafts.
        prefix_counts: see `PredictorNetwork`.
        trained_temperature: for which `prefix_counts` are valid; None for all temperatures.
    """
    at_all: dict[float, list[tuple[int, int]]] = defaultdict(list)
    at_drafts: dict[float, list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        if record.decoder == ALL_POSITIONS:
            at_all[record.temperature] += enumerate(record.correct_per_cycle, start=record.num_prompt_tokens)
        elif record.decoder == SPECULATIVE:
            at_drafts[record.temperature] += _complete_drafts(record, window_length)
    return [
        AcceptanceGap(
            temperature,
            None
            if prefix_counts is None or trained_temperature not in (None, temperature)
            else _survival_of_counts(prefix_counts, window_length),
            _survival(np.array([correct for _, correct in drafts]), window_length),
            _survival(np.array([correct for _, correct in at_drafts[temperature]]), window_length)
            if at_drafts[temperature]
            else None,
            _by_context(drafts, at_drafts[temperature]),
        )
        for temperature, drafts in sorted(at_all.items())
        if drafts
    ]


def _complete_drafts(record: Record, window_length: int) -> list[tuple[int, int]]:
    """(tokens of context, correct tokens) of each draft of full length."""
    starts = accumulate(record.committed_per_cycle, initial=record.num_prompt_tokens)
    drafts = zip(starts, record.correct_per_cycle, record.drafted_per_cycle, strict=False)
    return [(start, correct) for start, correct, drafted in drafts if drafted == window_length]


def _survival(correct: np.ndarray, window_length: int) -> list[float]:
    return [float((correct >= position).mean()) for position in range(1, window_length + 1)]


def _survival_of_counts(counts: Sequence[int], window_length: int) -> list[float]:
    """As `_survival`, of how many windows have a correct prefix of 0, 1, .. tokens."""
    total = sum(counts) or math.nan
    return [sum(counts[position:]) / total for position in range(1, window_length + 1)]


def _by_context(at_all: Sequence[tuple[int, int]], at_drafts: Sequence[tuple[int, int]]) -> list[ContextBin]:
    bins = []
    for first, end in zip(CONTEXT_BIN_STARTS, (*CONTEXT_BIN_STARTS[1:], math.inf), strict=True):
        means = [
            float(np.mean(inside)) if (inside := [c for start, c in drafts if first <= start < end]) else None
            for drafts in (at_all, at_drafts)
        ]
        if means != [None, None]:
            bins.append(ContextBin(first, None if end == math.inf else int(end) - 1, *means))
    return bins
