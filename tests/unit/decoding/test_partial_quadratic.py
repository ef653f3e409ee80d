"""Partial quadratic decoding gives the reference text, whatever the drafts and the budget are."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from ptp_lightning.decoding import (
    CorrectLengths,
    Decoded,
    GenerationSettings,
    decode_partially_quadratically,
)
from ptp_lightning.decoding.slot_allocation import allocate_slots
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, ForcedDraft, decode_one, reference, slot_logits_of_training
from tests.helpers.tiny_predictors import OBJECTIVES, STUDENTS, tiny_predictor

VOCABULARY = 32
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "truncated": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
    "full": SamplingConfig(),
}
LENGTHS = CorrectLengths.geometric(0.6, 5)


@cache
def small(family: str = "llama", objective: str = "categorical", student: str = "gated_lora") -> PredictorNetwork:
    """Decoding changes nothing in a predictor, so tests share them; "conditioned" gets the sampling settings."""
    sampling_range = None
    if student == "conditioned":
        student, sampling_range = "gated_lora", SamplingRange(0.3, 1.2, 0.1, (None,), (1.0,))
    return tiny_predictor(family, objective, vocab_size=VOCABULARY, student=student, sampling_range=sampling_range)


def decoded(predictor: PredictorNetwork, settings: GenerationSettings, **options: Any) -> Decoded:
    """Decodes, and checks what holds for every run: a call commits its correct tokens, and streams them."""
    streamed: list[list[int]] = []
    options = {"lengths": LENGTHS} | options
    found = decode_one(
        decode_partially_quadratically,
        predictor,
        settings,
        on_tokens=lambda _, token_ids: streamed.append(token_ids),
        **options,
    )
    assert [token_id for tokens in streamed for token_id in tokens] == found.token_ids
    assert [len(tokens) for tokens in streamed] == found.correct_per_cycle
    # A copy has a call of its own wherever there are slots; the last calls have none.
    most = len(streamed) * (1 if predictor.student_copy is None else 2)
    assert len(streamed) <= found.num_calls <= most
    return found


@one_in(3, family=["llama", "qwen2", "gpt2", "gpt_neox"], objective=OBJECTIVES, sampling=SAMPLING)
def test_text_is_the_reference_text(family: str, objective: str, sampling: str) -> None:
    predictor = small(family, objective)
    for seed, (max_new_tokens, budget) in enumerate([(21, 1), (22, 9), (23, 40)]):
        settings = GenerationSettings(SAMPLING[sampling], max_new_tokens, seed, window_length=6, slot_budget=budget)
        assert decoded(predictor, settings).token_ids == reference(predictor, settings)


@one_in(3, family=["llama", "gpt2"], student=STUDENTS, acceptance_rate=[0.0, 0.7, 1.0])
def test_forced_drafts_change_nothing(family: str, student: str, acceptance_rate: float) -> None:
    predictor = small(family, student=student)
    for seed, (window_length, budget) in enumerate([(2, 3), (3, 2), (7, 16), (16, 64)]):
        settings = GenerationSettings(SAMPLING["truncated"], 23, seed, frozenset(), window_length, budget)
        text = reference(predictor, settings)
        draft = ForcedDraft([text], acceptance_rate, VOCABULARY)
        lengths = CorrectLengths.geometric(0.8, 15)
        found = decoded(predictor, settings, drafter=draft, lengths=lengths)
        assert found.token_ids == text


class TestCounting:
    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 11, 20])
    def test_right_drafts_are_committed_with_one_token_more(self, max_new_tokens: int) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=max_new_tokens, window_length=6, slot_budget=9)
        text = reference(predictor, settings)
        found = decoded(predictor, settings, drafter=ForcedDraft([text], 1.0, VOCABULARY))
        expected, length, done = [], 0, 0
        while done < max_new_tokens:
            expected.append(min(length + 1, max_new_tokens - done))
            done += length + 1
            length = min(allocate_slots(LENGTHS, length, 9)[-1], max(0, max_new_tokens - done - 1))
        assert found.correct_per_cycle == expected
        assert found.token_ids == text

    def test_wrong_drafts_cost_nothing_but_slots(self) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=9, window_length=6)
        text = reference(predictor, settings)
        found = decoded(predictor, settings, drafter=ForcedDraft([text], 0.0, VOCABULARY))
        assert found.correct_per_cycle == [1] * 9

    def test_a_right_token_after_a_wrong_one_does_not_count(self) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=8, window_length=6, slot_budget=99)
        text = reference(predictor, settings)

        def third_is_wrong(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
            (start,) = starts
            draft = torch.tensor([[*text, *[0] * 9][start : start + auxiliaries.shape[1]]])
            if start == 1:
                draft[0, 2] = (draft[0, 2] + 1) % VOCABULARY
            return draft

        # Enough slots for five in every branch: a token, two of five and the correction, and the four that are left.
        assert decoded(predictor, settings, drafter=third_is_wrong).correct_per_cycle == [1, 3, 4]

    def test_a_branch_has_no_more_slots_than_a_window(self) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=20, window_length=3, slot_budget=99)
        text = reference(predictor, settings)
        draft = ForcedDraft([text], 1.0, VOCABULARY)
        assert max(decoded(predictor, settings, drafter=draft).correct_per_cycle) == 3


@pytest.mark.parametrize("acceptance_rate", [0.0, 0.7, 1.0])
def test_text_ends_where_the_reference_ends(acceptance_rate: float) -> None:
    predictor = small()
    open_ended = GenerationSettings(max_new_tokens=24, seed=5, window_length=6)
    text = reference(predictor, open_ended)
    for end in dict.fromkeys(text):  # as first, middle and last token of what a call commits
        settings = replace(open_ended, end_of_text=frozenset({end}))
        found = decoded(predictor, settings, drafter=ForcedDraft([text], acceptance_rate, VOCABULARY))
        assert found.token_ids == text[: text.index(end) + 1]
        assert found.finish_reason == "eos"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_position_of_the_model_can_be_filled(family: str) -> None:
    predictor = tiny_predictor(family, vocab_size=VOCABULARY, max_position_embeddings=16)
    settings = GenerationSettings(max_new_tokens=11, window_length=16, slot_budget=64)
    text = reference(predictor, settings)
    for acceptance_rate in (0.0, 1.0):
        draft = ForcedDraft([text], acceptance_rate, VOCABULARY)
        lengths = CorrectLengths.geometric(0.9, 15)
        assert decoded(predictor, settings, drafter=draft, lengths=lengths).token_ids == text


@one_in(2, family=["llama", "gpt2"], student=[*STUDENTS, "conditioned"], objective=OBJECTIVES)
def test_slot_logits_are_those_of_training(family: str, student: str, objective: str) -> None:
    """In the first pass and each refinement step: a branch sees the correct part of the draft and no other branch."""
    predictor = small(family, objective, student)
    settings = GenerationSettings(max_new_tokens=16, window_length=5, slot_budget=12)
    u = pad(settings.auxiliaries(1, torch.device("cpu")), (0, 9))
    text = torch.tensor([PROMPT + reference(predictor, settings)])
    earlier: dict[int, list[Tensor]] = {}

    def compare(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        (start,) = starts
        first, num_slots = len(PROMPT) + start - 1, auxiliaries.shape[1]
        passes = earlier.setdefault(start, [])
        of_window = u[:, start - 1 : start + num_slots]
        expected = slot_logits_of_training(predictor, text, first, of_window, passes[-1] if passes else None)
        torch.testing.assert_close(slot_logits, expected, atol=1e-4, rtol=1e-4)
        draft = text[:, first + 1 : first + 1 + num_slots].clone()
        draft[0, 1:] = (draft[0, 1:] + start + len(passes)) % VOCABULARY  # the first is correct, the rest mostly not
        passes.append(draft)
        return draft

    assert decoded(predictor, settings, drafter=compare).token_ids == text[0, len(PROMPT) :].tolist()
    assert len(earlier) > 5 and max(len(passes) for passes in earlier.values()) == 1 + predictor.num_refinement_steps
