"""Scores of decoders, from their records: tokens per call, speed with confidence intervals, and exactness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptp_lightning.evaluation.decoder_names import AUTOREGRESSIVE, TRANSFORMERS
from ptp_lightning.evaluation.records import ALL_POSITIONS, Record

NUM_RESAMPLES = 2000
MILLISECONDS_PER_SECOND = 1000
OVERALL = "overall"


class ConfidenceInterval(NamedTuple):
    """A ratio and its 95 % bootstrap interval over questions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """The results of a decoder at one temperature, for the questions of one category or all questions.

    Attributes:
        decoder: name of the decoder.
        temperature: of the sampling.
        category: of the questions, or `OVERALL`.
        num_answers: number of answers, of all turns and seeds.
        num_tokens: total length of the answers.
        tokens_per_call: tokens per forward pass, including those that read prompts.
        tokens_per_cycle: tokens committed per draft: the correct tokens, and the token that the base model picks after
            them (the "+1"), of which late slots' cycles commit one less; None without drafts.
        correct_per_cycle: correct tokens of a draft, including the exact first token, without the "+1".
        milliseconds_per_token: median over answers.
        speed: tokens per second, relative to the autoregressive decoder.
        transformers_speed: tokens per second, relative to `transformers.generate`; None if it was not run.
        call_cost: time per forward pass, including everything else, in steps of the autoregressive decoder; a decoder
            is faster if its tokens per call exceed this number.
        phases: fraction of the time by phase.
        peak_bytes: peak memory.
        num_identical: number of answers identical to the autoregressive decoder's; None for decoders that sample in
            another way.
        accuracy_given_prefix: of tokens 1, 2, .. of drafts, given that the tokens before them are correct.
    """

    decoder: str
    temperature: float
    category: str
    num_answers: int
    num_tokens: int
    tokens_per_call: float
    tokens_per_cycle: float | None
    correct_per_cycle: float | None
    milliseconds_per_token: float
    speed: ConfidenceInterval
    transformers_speed: ConfidenceInterval | None
    call_cost: float
    phases: dict[str, float]
    peak_bytes: int
    num_identical: int | None
    accuracy_given_prefix: list[float]


def scores(records: Iterable[Record], decoders: Sequence[str], exact: Sequence[str]) -> list[Score]:
    """The score of each decoder and temperature, overall and by category.

    Args:
        records: of all decoders; those of `ALL_POSITIONS` are skipped.
        decoders: their names, in the order of the report.
        exact: names of decoders whose text must be identical to the autoregressive decoder's.
    """
    groups: dict[tuple[float, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.decoder != ALL_POSITIONS:
            for category in (OVERALL, record.category):
                groups[record.temperature, category, record.decoder].append(record)
    found = []
    for (temperature, category, decoder), group in groups.items():
        reference = groups[temperature, category, AUTOREGRESSIVE]
        baseline = groups.get((temperature, category, TRANSFORMERS))
        found.append(_score(decoder, temperature, category, group, reference, baseline, decoder in exact))
    order = {name: index for index, name in enumerate(decoders)}

    def rank(score: Score) -> tuple[float, bool, str, int]:
        return score.temperature, score.category != OVERALL, score.category, order[score.decoder]

    return sorted(found, key=rank)


def _score(
    decoder: str,
    temperature: float,
    category: str,
    group: list[Record],
    reference: list[Record],
    baseline: list[Record] | None,
    is_exact: bool,
) -> Score:
    tokens = sum(len(record.token_ids) for record in group)
    calls = sum(record.num_calls for record in group)
    seconds = sum(record.seconds for record in group)
    correct = [number for record in group for number in record.correct_per_cycle]
    committed = [number for record in group for number in record.committed_per_cycle]
    texts = {record.key._replace(decoder=""): record.token_ids for record in reference}
    return Score(
        decoder=decoder,
        temperature=temperature,
        category=category,
        num_answers=len(group),
        num_tokens=tokens,
        tokens_per_call=tokens / calls,
        tokens_per_cycle=float(np.mean(committed)) if committed else None,
        correct_per_cycle=float(np.mean(correct)) if correct else None,
        milliseconds_per_token=float(
            np.median([MILLISECONDS_PER_SECOND * record.seconds / max(1, len(record.token_ids)) for record in group])
        ),
        speed=speed_ratio(group, reference),
        transformers_speed=None if baseline is None else speed_ratio(group, baseline),
        call_cost=seconds / calls / _seconds_per_token(reference),
        phases=_phases(group),
        peak_bytes=max(record.peak_bytes for record in group),
        num_identical=sum(texts[record.key._replace(decoder="")] == record.token_ids for record in group)
        if is_exact
        else None,
        accuracy_given_prefix=accuracy_given_prefix(group),
    )


def speed_ratio(group: Sequence[Record], reference: Sequence[Record]) -> ConfidenceInterval:
    """Tokens per second of `group`, relative to `reference`."""
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
    return ConfidenceInterval(float(ratio(np.arange(len(names)))), float(low), float(high))


def accuracy_given_prefix(group: Iterable[Record]) -> list[float]:
    """Accuracy of tokens 1, 2, .. of drafts, given that all tokens before them are correct.

    Token 0 is exact. If a text ends within a correct draft, its next token is unknown and is not counted.
    """
    reached: dict[int, int] = defaultdict(int)
    num_correct: dict[int, int] = defaultdict(int)
    for record in group:
        pairs = list(zip(record.correct_per_cycle, record.drafted_per_cycle, strict=True))
        for cycle, (correct, drafted) in enumerate(pairs):
            for position in range(1, min(correct, drafted)):
                reached[position] += 1
                num_correct[position] += 1
            if correct < drafted and cycle < len(pairs) - 1:
                reached[correct] += 1
    return [num_correct[position] / reached[position] for position in range(1, max(reached, default=0) + 1)]


def _by_question(records: Iterable[Record]) -> dict[str, tuple[float, int]]:
    """Seconds and tokens of each question, summed over turns and seeds."""
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
