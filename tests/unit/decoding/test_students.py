"""Students that are copies of the base model, or the base model itself, give the reference text; their calls count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.decoding import Decoded, GenerationSettings, decode_speculatively
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_decoding import PROMPT, decode_one, reference, slot_logits_of_training
from tests.helpers.tiny_predictors import OBJECTIVES, tiny_predictor

VOCABULARY = 32
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "truncated": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
    "full": SamplingConfig(),
}
CALLS_PER_CYCLE = {"full_copy": 3, "shared": 2}
by_student = pytest.mark.parametrize("student", CALLS_PER_CYCLE)


@cache
def small(student: str, family: str = "llama", objective: str = "categorical") -> PredictorNetwork:
    """Decoding changes nothing in a predictor, so tests share them."""
    return tiny_predictor(family, objective, vocab_size=VOCABULARY, student=student)


def forced(text: list[int], wrong: set[int]) -> Any:
    """A drafter of the correct tokens, except at some positions of the new text."""

    def draft(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        (start,) = starts
        positions = range(start, start + auxiliaries.shape[1])
        return torch.tensor([[(text[position] + (position in wrong)) % VOCABULARY for position in positions]])

    return draft


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@by_student
def test_text_is_the_reference_text(student: str, family: str, objective: str, sampling: str) -> None:
    predictor = small(student, family, objective)
    for seed, max_new_tokens in enumerate((24, 21)):
        settings = GenerationSettings(SAMPLING[sampling], max_new_tokens, seed, window_length=6)
        decoded = decode_one(decode_speculatively, predictor, settings)
        assert decoded.token_ids == reference(predictor, settings)


@pytest.mark.parametrize("wrong", [set(), {3}, {1, 5, 6, 11}, set(range(24))], ids=str)
@pytest.mark.parametrize("sampling", SAMPLING)
@by_student
def test_forced_drafts_change_nothing(student: str, sampling: str, wrong: set[int]) -> None:
    predictor = small(student)
    for seed, window_length in enumerate((2, 3, 7, 16)):
        settings = GenerationSettings(SAMPLING[sampling], 23, seed, window_length=window_length)
        text = reference(predictor, settings)
        decoded = decode_one(decode_speculatively, predictor, settings, drafter=forced(text, wrong))
        assert decoded.token_ids == text


@pytest.mark.parametrize("max_new_tokens", range(1, 12))
@by_student
def test_every_call_counts(student: str, max_new_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = small(student)
    settings = GenerationSettings(max_new_tokens=max_new_tokens, window_length=4)
    text = reference(predictor, settings)
    num_calls = 0

    def count(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    stacks = {id(model): model for model in (predictor.base_model, predictor.student_model)}.values()
    hooks = [getattr(model, model.base_model_prefix).register_forward_hook(count) for model in stacks]
    run = JoinedDecoder.run
    monkeypatch.setattr(JoinedDecoder, "run", lambda *args: [count(), run(*args)][1])  # in place of the base model's
    decoded: Decoded = decode_one(decode_speculatively, predictor, settings, drafter=forced(text, set()))
    for hook in hooks:
        hook.remove()
    cycles, rest = divmod(max_new_tokens, 5)
    # One token left: a call. Two: its window has no slot, so that a copy has nothing to say.
    expected = CALLS_PER_CYCLE[student] * cycles + (rest if rest < 3 else CALLS_PER_CYCLE[student])
    assert decoded.num_calls == num_calls == expected
    assert len(decoded.correct_per_cycle) == ceil(max_new_tokens / 5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@by_student
def test_slot_logits_are_those_of_training(student: str, family: str) -> None:
    """After correct and wrong drafts: the copy has read what was committed, and nothing else."""
    predictor = small(student, family)
    settings = GenerationSettings(max_new_tokens=14, window_length=5)
    u = settings.auxiliaries(1, torch.device("cpu"))
    text = torch.cat([torch.tensor([PROMPT]), torch.tensor([reference(predictor, settings)])], dim=1)
    seen: list[int] = []

    def compare(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        (start,) = starts
        first, num_slots = len(PROMPT) + start - 1, auxiliaries.shape[1]
        correct = text[:, first + 1 : first + 1 + num_slots]
        if start not in seen:  # not yet refined
            seen.append(start)
            of_window = u[:, start - 1 : start + num_slots]
            expected = slot_logits_of_training(predictor, text, first, of_window, None)
            torch.testing.assert_close(slot_logits, expected, atol=1e-4, rtol=1e-4)
        return (correct + (start > 1)) % VOCABULARY  # correct in the first window only

    assert decode_one(decode_speculatively, predictor, settings, drafter=compare).token_ids == text[0, 5:].tolist()
    assert seen == [1, 7, 9, 11]


@torch.inference_mode()
def test_a_copy_of_a_base_in_bfloat16_is_float32_and_decodes() -> None:
    predictor = tiny_predictor(vocab_size=VOCABULARY, student="full_copy", dtype=torch.bfloat16)
    assert predictor.student_model.dtype == torch.float32 and predictor.base_model.dtype == torch.bfloat16
    settings = GenerationSettings(SamplingConfig(temperature=0), 12, window_length=4)
    decoded = decode_one(decode_speculatively, predictor, settings)
    assert len(decoded.token_ids) == 12
