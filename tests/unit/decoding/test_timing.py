"""All of a decoder's time is of some phase, and drafts are counted as long as they were."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.decoding.timing import PHASES, PhaseTimer
from ptp_lightning.evaluation.acceptance_gap import correct_tokens_at_all_positions
from tests.helpers.tiny_decoding import PROMPT, Decode, decode_one
from tests.helpers.tiny_predictors import tiny_predictor

PREDICTOR = tiny_predictor(vocab_size=32)
SETTINGS = GenerationSettings(max_new_tokens=24, window_length=5, slot_budget=7)


def ticks() -> Callable[[], float]:
    """A clock that goes on by one each time it is read."""
    times = iter(range(10**6))
    return lambda: float(next(times))


@pytest.mark.parametrize(
    ("decode", "cycle"),
    [
        (decode_autoregressively, {"forward": 1, "verifying": 1, "drafting": 0, "bookkeeping": 1}),
        (decode_speculatively, {"forward": 2, "verifying": 1, "drafting": 1, "bookkeeping": 1}),
        (decode_partially_quadratically, {"forward": 1, "verifying": 1, "drafting": 1, "bookkeeping": 1}),
    ],
    ids=["autoregressive", "speculative", "partial_quadratic"],
)
def test_each_phase_ends_with_its_lap(decode: Decode, cycle: dict[str, int]) -> None:
    timer = PhaseTimer(ticks())
    decoded = decode_one(decode, PREDICTOR, SETTINGS, timer=timer)
    num_cycles = len(decoded.correct_per_cycle) or len(decoded.token_ids)
    assert set(timer.seconds) == set(PHASES)
    for phase, laps_of_cycle in cycle.items():
        # The last cycle has nothing to draft, or nothing to verify.
        assert 0 <= laps_of_cycle * num_cycles - timer.seconds[phase] <= laps_of_cycle


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    PhaseTimer(ticks()).mark("forward")
    assert not waits
    PhaseTimer(ticks(), torch.device("cuda")).mark("forward")
    assert len(waits) == 1


@pytest.mark.parametrize("decode", [decode_speculatively, decode_partially_quadratically], ids=lambda d: d.__name__)
def test_no_more_is_right_than_was_drafted(decode: Decode) -> None:
    decoded = decode_one(decode, PREDICTOR, SETTINGS)
    pairs = list(zip(decoded.correct_per_cycle, decoded.drafted_per_cycle, strict=True))
    assert all(1 <= correct <= drafted <= SETTINGS.window_length for correct, drafted in pairs)


def test_speculative_drafts_are_whole_until_the_text_ends() -> None:
    drafted = decode_one(decode_speculatively, PREDICTOR, SETTINGS).drafted_per_cycle
    assert drafted[:-4] == [5] * (len(drafted) - 4) and drafted == sorted(drafted, reverse=True)


def test_correct_tokens_at_all_positions_match_those_of_a_decoder() -> None:
    """A small vocabulary, so that drafts have different numbers of correct tokens."""
    predictor = tiny_predictor(vocab_size=4)
    prompt = [token_id % 4 for token_id in PROMPT]
    settings = replace(SETTINGS, max_new_tokens=60)
    decoded = decode_one(decode_speculatively, predictor, settings, prompt)
    at_all = correct_tokens_at_all_positions(predictor, prompt, decoded.token_ids, settings)
    assert len(at_all) == 60 - 5 + 1
    starts = accumulate((correct + 1 for correct in decoded.correct_per_cycle), initial=0)
    cycles = zip(starts, decoded.correct_per_cycle, decoded.drafted_per_cycle, strict=False)
    at_drafts = [(start, correct) for start, correct, drafted in cycles if drafted == 5 and start < len(at_all)]
    assert len({correct for _, correct in at_drafts}) >= 3
    assert [at_all[start] for start, _ in at_drafts] == [correct for _, correct in at_drafts]
    assert correct_tokens_at_all_positions(predictor, prompt, decoded.token_ids[:4], settings) == []
