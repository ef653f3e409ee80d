"""From records to numbers: tokens per call, speed with its uncertainty, exactness, and where acceptance is lost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ptp_lightning.evaluation.contenders import AUTOREGRESSIVE, SPECULATIVE, TRANSFORMERS
from ptp_lightning.evaluation.records import Record
from ptp_lightning.evaluation.runner import EVERYWHERE

NUM_RESAMPLES = 2000
MILLISECONDS = 1000  # in a second
OVERALL = "overall"
CONTEXT_BORDERS = (0, 32, 64, 128, 256, 512, 1024, 2048)


class Interval(NamedTuple):
    """A ratio and its 95 % bootstrap interval; questions are what is drawn again."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """How one contender did at one temperature, on the questions of one category or on all.

    Attributes:
        contender: who answered.
        temperature: of the sampling.
        category: of the questions, or `OVERALL`.
        num_answers: answers to turns, all seeds.
        num_tokens: in them.
        tokens_per_call: all tokens over all forward passes, those that read prompts included.
        tokens_per_cycle: what a draft and its verification commit: correct tokens, and the base model's pick after
            them (the "+1"); None without drafts.
        correct_per_cycle: correct tokens of a draft, the exact first token counted, without the "+1".
        milliseconds_per_token: median over answers.
        speed: tokens per second over those of the autoregressive decoder.
        library_speed: the same over those of `transformers.generate`, if it ran.
        call_cost: time of a forward pass, with all that belongs to it, in steps of the autoregressive decoder; a
            contender has to get more tokens from a call than this to be faster.
        phases: share of the time.
        peak_bytes: the most memory in use.
        num_identical: answers that are the autoregressive decoder's; None for contenders that sample otherwise.
        accuracy_given_prefix: of the tokens 1, 2, .. of drafts, where those before were right and the draft went on.
    """

    contender: str
    temperature: float
    category: str
    num_answers: int
    num_tokens: int
    tokens_per_call: float
    tokens_per_cycle: float | None
    correct_per_cycle: float | None
    milliseconds_per_token: float
    speed: Interval
    library_speed: Interval | None
    call_cost: float
    phases: dict[str, float]
    peak_bytes: int
    num_identical: int | None
    accuracy_given_prefix: list[float]


@dataclass(frozen=True)
class ContextBin:
    """Mean correct tokens of drafts that follow `first` to `last` tokens (or more); None where there were none."""

    first: int
    last: int | None
    everywhere: float | None
    landed: float | None


@dataclass(frozen=True)
class Gap:
    """From validation to decoding, at one temperature: how likely at least 1, 2, .. L tokens of a draft are right.

    Attributes:
        temperature: of the sampling.
        validation: of held-out windows, as stored with the predictor; None if it has none, or was trained for another
            temperature alone.
        everywhere: at every place of the decoded texts.
        landed: where speculative decoding asked for a whole draft; None if it did not run.
        by_context: by tokens before the draft.
    """

    temperature: float
    validation: list[float] | None
    everywhere: list[float]
    landed: list[float] | None
    by_context: list[ContextBin]


def scores(records: Iterable[Record], contenders: Sequence[str], exact: Sequence[str]) -> list[Score]:
    """One for each contender and temperature, overall and by category.

    Args:
        records: of all contenders; those of `EVERYWHERE` are left out.
        contenders: their names, in the order of the report.
        exact: names of contenders whose text has to be the autoregressive decoder's.
    """
    groups: dict[tuple[float, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.contender != EVERYWHERE:
            for category in (OVERALL, record.category):
                groups[record.temperature, category, record.contender].append(record)
    found = []
    for (temperature, category, contender), group in groups.items():
        reference = groups[temperature, category, AUTOREGRESSIVE]
        library = groups.get((temperature, category, TRANSFORMERS))
        found.append(_score(contender, temperature, category, group, reference, library, contender in exact))
    places = {name: place for place, name in enumerate(contenders)}

    def rank(score: Score) -> tuple[float, bool, str, int]:
        return score.temperature, score.category != OVERALL, score.category, places[score.contender]

    return sorted(found, key=rank)


def _score(
    contender: str,
    temperature: float,
    category: str,
    group: list[Record],
    reference: list[Record],
    library: list[Record] | None,
    is_exact: bool,
) -> Score:
    tokens = sum(len(record.token_ids) for record in group)
    calls = sum(record.num_calls for record in group)
    seconds = sum(record.seconds for record in group)
    correct = [number for record in group for number in record.correct_per_cycle]
    texts = {record.key._replace(contender=""): record.token_ids for record in reference}
    return Score(
        contender=contender,
        temperature=temperature,
        category=category,
        num_answers=len(group),
        num_tokens=tokens,
        tokens_per_call=tokens / calls,
        tokens_per_cycle=tokens / len(correct) if correct else None,
        correct_per_cycle=float(np.mean(correct)) if correct else None,
        milliseconds_per_token=float(
            np.median([MILLISECONDS * record.seconds / max(1, len(record.token_ids)) for record in group])
        ),
        speed=speed_ratio(group, reference),
        library_speed=None if library is None else speed_ratio(group, library),
        call_cost=seconds / calls / _seconds_per_token(reference),
        phases=_phases(group),
        peak_bytes=max(record.peak_bytes for record in group),
        num_identical=sum(texts[record.key._replace(contender="")] == record.token_ids for record in group)
        if is_exact
        else None,
        accuracy_given_prefix=accuracy_given_prefix(group),
    )


def speed_ratio(group: Sequence[Record], reference: Sequence[Record]) -> Interval:
    """Tokens per second of `group` over those of `reference`."""
    cost, reference_cost = (_by_question(records) for records in (group, reference))
    names = sorted(cost.keys() & reference_cost.keys())
    own, other = (np.array([costs[name] for name in names]) for costs in (cost, reference_cost))
    draws = np.random.default_rng(0).integers(len(names), size=(NUM_RESAMPLES, len(names)))

    def ratio(index: np.ndarray) -> np.ndarray:
        (seconds, tokens), (other_seconds, other_tokens) = (
            np.moveaxis(costs[index].sum(axis=-2), -1, 0) for costs in (own, other)
        )
        return (tokens / seconds) / (other_tokens / other_seconds)

    low, high = np.quantile(ratio(draws), [0.025, 0.975])
    return Interval(float(ratio(np.arange(len(names)))), float(low), float(high))


def accuracy_given_prefix(group: Iterable[Record]) -> list[float]:
    """Of drafts that have a token 1, 2, .. and all tokens before it right: how often it is right too.

    Token 0 is exact. A text that ends inside a draft, right as it is, tells nothing of what would have followed.
    """
    reached: dict[int, int] = defaultdict(int)
    right: dict[int, int] = defaultdict(int)
    for record in group:
        pairs = list(zip(record.correct_per_cycle, record.drafted_per_cycle, strict=True))
        for place, (correct, drafted) in enumerate(pairs):
            for position in range(1, min(correct, drafted)):
                reached[position] += 1
                right[position] += 1
            if correct < drafted and place < len(pairs) - 1:
                reached[correct] += 1
    return [right[position] / reached[position] for position in range(1, max(reached, default=0) + 1)]


def gaps(
    records: Iterable[Record],
    window_length: int,
    prefix_counts: Sequence[int] | None,
    trained_temperature: float | None,
) -> list[Gap]:
    """One for each temperature.

    Args:
        records: those of `EVERYWHERE` among them.
        window_length: L, of whole drafts.
        prefix_counts: see `PredictorNetwork`.
        trained_temperature: that they hold for; None for all.
    """
    everywhere: dict[float, list[tuple[int, int]]] = defaultdict(list)
    landed: dict[float, list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        if record.contender == EVERYWHERE:
            everywhere[record.temperature] += enumerate(record.correct_per_cycle, start=record.num_prompt_tokens)
        elif record.contender == SPECULATIVE:
            landed[record.temperature] += _whole_drafts(record, window_length)
    return [
        Gap(
            temperature,
            None
            if prefix_counts is None or trained_temperature not in (None, temperature)
            else _survival(np.repeat(np.arange(len(prefix_counts)), prefix_counts), window_length),
            _survival(np.array([correct for _, correct in drafts]), window_length),
            _survival(np.array([correct for _, correct in landed[temperature]]), window_length)
            if landed[temperature]
            else None,
            _by_context(drafts, landed[temperature]),
        )
        for temperature, drafts in sorted(everywhere.items())
        if drafts
    ]


def _whole_drafts(record: Record, window_length: int) -> list[tuple[int, int]]:
    """Tokens before each draft of full length, and how many of it were right."""
    starts = accumulate((correct + 1 for correct in record.correct_per_cycle), initial=record.num_prompt_tokens)
    drafts = zip(starts, record.correct_per_cycle, record.drafted_per_cycle, strict=False)
    return [(start, correct) for start, correct, drafted in drafts if drafted == window_length]


def _survival(correct: np.ndarray, window_length: int) -> list[float]:
    return [float((correct >= position).mean()) for position in range(1, window_length + 1)]


def _by_context(everywhere: Sequence[tuple[int, int]], landed: Sequence[tuple[int, int]]) -> list[ContextBin]:
    bins = []
    for first, end in zip(CONTEXT_BORDERS, (*CONTEXT_BORDERS[1:], math.inf), strict=True):
        means = [
            float(np.mean(inside)) if (inside := [c for start, c in drafts if first <= start < end]) else None
            for drafts in (everywhere, landed)
        ]
        if means != [None, None]:
            bins.append(ContextBin(first, None if end == math.inf else int(end) - 1, *means))
    return bins


def _by_question(records: Iterable[Record]) -> dict[str, tuple[float, int]]:
    """Seconds and tokens of each question, all its turns and seeds together."""
    costs: dict[str, tuple[float, int]] = {}
    for record in records:
        seconds, tokens = costs.get(record.question_id, (0.0, 0))
        costs[record.question_id] = (seconds + record.seconds, tokens + len(record.token_ids))
    return costs


def _seconds_per_token(records: Sequence[Record]) -> float:
    return sum(record.seconds for record in records) / sum(len(record.token_ids) for record in records)


def _phases(group: Iterable[Record]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for record in group:
        for phase, seconds in record.phases.items():
            total[phase] += seconds
    everything = sum(total.values())
    return {phase: seconds / everything for phase, seconds in total.items()} if everything else {}
