"""Speculative decoding gives the reference text, token for token, whatever the drafts are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import ceil

import pytest
import torch
from torch import Tensor

from ptp_lightning.decoding import (
    Decoded,
    Drafter,
    GenerationSettings,
    decode_autoregressively,
    decode_speculatively,
)
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, Decode, ForcedDraft, decode_one, reference, slot_logits_of_training
from tests.helpers.tiny_predictors import OBJECTIVES, tiny_predictor

VOCABULARY = 32  # smaller than top_k
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "greedy by token id": SamplingConfig(temperature=0, order="vocabulary"),
    "truncated": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
    "truncated by token id": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, order="vocabulary"),
    "full": SamplingConfig(),
    "full by token id": SamplingConfig(order="vocabulary"),
    "truncated by embedding": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, order="embedding"),
    "full by embedding": SamplingConfig(order="embedding"),
}
FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox"]


def forced(text: list[int], acceptance_rate: float) -> ForcedDraft:
    return ForcedDraft([text], acceptance_rate, VOCABULARY)


@cache
def small(family: str = "llama", objective: str = "categorical") -> PredictorNetwork:
    """Decoding changes nothing in a predictor, so tests share them. They know all orders, and some drafts are right."""
    return tiny_predictor(family, objective, SamplingConfig(order="embedding"), vocab_size=VOCABULARY, seed=6)


@cache
def conditioned(objective: str = "categorical", student: str = "gated_lora") -> PredictorNetwork:
    """Trained for many settings, in the order "embedding"."""
    sampling_range = SamplingRange(0.3, 1.2, 0.1, (50, None), (0.9, 1.0))
    order = SamplingConfig(order="embedding")
    return tiny_predictor(
        "llama", objective, order, vocab_size=VOCABULARY, sampling_range=sampling_range, student=student
    )


def accelerated(
    predictor: PredictorNetwork,
    settings: GenerationSettings,
    prompt: Sequence[int] = PROMPT,
    drafter: Drafter | None = None,
) -> Decoded:
    """Decodes, and checks what holds for every run."""
    streamed: list[list[int]] = []
    decoded = decode_one(
        decode_speculatively,
        predictor,
        settings,
        prompt,
        on_tokens=lambda _, token_ids: streamed.append(token_ids),
        drafter=drafter,
    )
    assert [token_id for tokens in streamed for token_id in tokens] == decoded.token_ids
    assert all(streamed)
    cycles, correct_per_cycle = streamed, decoded.correct_per_cycle
    assert len(cycles) == len(correct_per_cycle) == ceil(decoded.num_calls / 2)
    for tokens, correct in zip(cycles[:-1], correct_per_cycle, strict=False):
        assert len(tokens) == correct + 1
    assert not cycles or len(cycles[-1]) - correct_per_cycle[-1] in (0, 1)
    return decoded


@one_in(4, family=FAMILIES, objective=OBJECTIVES, sampling=SAMPLING)
def test_text_is_the_reference_text(family: str, objective: str, sampling: str) -> None:
    predictor = small(family, objective)
    for seed, max_new_tokens in enumerate((24, 21)):
        settings = GenerationSettings(SAMPLING[sampling], max_new_tokens, seed, window_length=6)
        assert accelerated(predictor, settings).token_ids == reference(predictor, settings)


@one_in(3, objective=OBJECTIVES, sampling=[*SAMPLING, "hot"])
def test_text_of_a_predictor_for_many_settings_is_the_reference_text(objective: str, sampling: str) -> None:
    """Whatever settings the slots are conditioned on: inside the range they were trained for, or outside."""
    predictor = conditioned(objective)
    config = SamplingConfig(2.0, top_k=3) if sampling == "hot" else SAMPLING[sampling]
    settings = GenerationSettings(config, 21, window_length=6)
    assert accelerated(predictor, settings).token_ids == reference(predictor, settings)


@pytest.mark.parametrize("student", ["gated_lora", "full_copy"])
def test_slots_and_refiner_are_conditioned_on_the_settings_of_the_text(student: str) -> None:
    predictor = conditioned(student=student)
    seen: dict[str, set[SamplingConfig]] = {"sampling_encoder": set(), "correction_sampling_encoder": set()}
    hooks = [
        predictor.slot_encoder.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, heard=heard: heard.add(inputs[0])
        )
        for name, heard in seen.items()
    ]
    settings = GenerationSettings(SamplingConfig(0.5, top_k=7, top_p=0.8), 9, window_length=4)
    decode_one(decode_speculatively, predictor, settings)
    for hook in hooks:
        hook.remove()
    assert seen == {"sampling_encoder": {settings.sampling}, "correction_sampling_encoder": {settings.sampling}}


def test_drafts_depend_on_the_settings_the_slots_are_conditioned_on() -> None:
    """The drafts of one text under the same sampling settings; only the settings given to the slots differ."""
    predictor = conditioned()
    settings = GenerationSettings(SamplingConfig(0.7), 24, window_length=6)
    drafts: list[list[Tensor]] = []
    for given in (SamplingConfig(0.7), SamplingConfig(1.2), SamplingConfig(0.7)):
        drafts.append([])

        def remember(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
            drafts[-1].append(slot_logits)
            return torch.zeros_like(auxiliaries, dtype=torch.long)

        modules = (predictor.slot_encoder.sampling_encoder, predictor.slot_encoder.correction_sampling_encoder)
        hooks = [m.register_forward_pre_hook(lambda _, inputs, given=given: (given,)) for m in modules if m]
        accelerated(predictor, settings, drafter=remember)
        for hook in hooks:
            hook.remove()
    first, other, again = drafts
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_drafts_of_the_tested_students_are_both_right_and_wrong() -> None:
    cycles: Counter[int] = Counter()
    for family in FAMILIES:
        predictor = small(family)
        for seed in range(2):
            settings = GenerationSettings(SAMPLING["truncated"], 24, seed, window_length=6)
            cycles.update(accelerated(predictor, settings).correct_per_cycle)
    assert cycles[1] > 0 and sum(cycles.values()) - cycles[1] > 5


@one_in(3, family=["llama", "gpt2"], sampling=SAMPLING, acceptance_rate=[0.0, 0.7, 1.0])
def test_forced_drafts_change_nothing(family: str, sampling: str, acceptance_rate: float) -> None:
    predictor = small(family)
    for seed, window_length in enumerate((2, 3, 7, 16)):
        settings = GenerationSettings(SAMPLING[sampling], 23, seed, window_length=window_length)
        text = reference(predictor, settings)
        assert accelerated(predictor, settings, drafter=forced(text, acceptance_rate)).token_ids == text


class TestCounting:
    """Two calls commit correct + 1 tokens; a single remaining token takes one call."""

    @pytest.mark.parametrize("max_new_tokens", range(1, 12))
    @pytest.mark.parametrize("window_length", [2, 4, 16])
    def test_right_drafts_commit_the_window_and_one_more(self, window_length: int, max_new_tokens: int) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=max_new_tokens, window_length=window_length)
        text = reference(predictor, settings)
        decoded = accelerated(predictor, settings, drafter=forced(text, 1.0))
        cycles, rest = divmod(max_new_tokens, window_length + 1)
        assert decoded.token_ids == text
        assert decoded.num_calls == 2 * cycles + min(rest, 2)
        assert decoded.correct_per_cycle == [window_length] * cycles + ([max(rest - 1, 1)] if rest else [])

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 20, 21])
    def test_wrong_drafts_commit_two(self, max_new_tokens: int) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=max_new_tokens, window_length=5)
        text = reference(predictor, settings)
        decoded = accelerated(predictor, settings, drafter=forced(text, 0.0))
        assert decoded.token_ids == text
        assert decoded.num_calls == max_new_tokens
        assert decoded.correct_per_cycle == [1] * ceil(max_new_tokens / 2)

    def test_a_right_token_after_a_wrong_one_does_not_count(self) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=7, window_length=5)
        text = reference(predictor, settings)

        def third_is_wrong(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
            (start,) = starts
            draft = torch.tensor([text[start : start + auxiliaries.shape[1]]])
            if start == 1:
                draft[0, 1] = (draft[0, 1] + 1) % VOCABULARY
            return draft

        decoded = accelerated(predictor, settings, drafter=third_is_wrong)
        assert decoded.token_ids == text
        assert decoded.correct_per_cycle == [2, 3]  # 3 of 7 tokens committed, then the other 4


class TestEndOfText:
    @one_in(2, window_length=[2, 8], acceptance_rate=[0.0, 0.7, 1.0])
    def test_text_ends_where_the_reference_ends(self, window_length: int, acceptance_rate: float) -> None:
        predictor = small()
        open_ended = GenerationSettings(max_new_tokens=24, seed=5, window_length=window_length)
        text = reference(predictor, open_ended)
        for end in dict.fromkeys(text):  # as first, middle, last and bonus token of windows
            settings = replace(open_ended, end_of_text=frozenset({end}))
            decoded = accelerated(predictor, settings, drafter=forced(text, acceptance_rate))
            assert decoded.token_ids == reference(predictor, settings) == text[: text.index(end) + 1]
            assert decoded.finish_reason == "eos"

    def test_a_draft_that_goes_on_after_the_end_is_correct_up_to_the_end(self) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=24, seed=5, window_length=8)
        text = reference(predictor, settings)
        position = next(k for k, token_id in enumerate(text) if k in (2, 3, 4) and token_id not in text[:k])
        settings = replace(settings, end_of_text=frozenset({text[position]}))
        decoded = accelerated(predictor, settings, drafter=forced(text, 1.0))
        assert decoded.correct_per_cycle == [position + 1]  # tokens 0 .. position

    def test_a_drafted_end_that_is_wrong_ends_nothing(self) -> None:
        predictor = small()
        settings = GenerationSettings(max_new_tokens=12, window_length=4)
        text = reference(predictor, settings)
        absent = next(token_id for token_id in range(VOCABULARY) if token_id not in text)
        settings = replace(settings, end_of_text=frozenset({absent}))

        def end_at_once(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
            return torch.full(auxiliaries.shape, absent)

        decoded = accelerated(predictor, settings, drafter=end_at_once)
        assert (decoded.token_ids, decoded.finish_reason) == (text, "length")


class TestRoom:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_prompt_of_one_token(self, family: str) -> None:
        predictor = small(family)
        settings = GenerationSettings(SAMPLING["truncated"], 15)
        assert accelerated(predictor, settings, [9]).token_ids == reference(predictor, settings, [9])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_last_position_of_the_model_can_be_filled(self, family: str) -> None:
        predictor = tiny_predictor(family, vocab_size=VOCABULARY, max_position_embeddings=16)
        settings = GenerationSettings(max_new_tokens=11, window_length=16)
        for acceptance_rate in (0.0, 1.0):
            text = reference(predictor, settings)
            assert accelerated(predictor, settings, drafter=forced(text, acceptance_rate)).token_ids == text
        for decode in (decode_autoregressively, decode_speculatively):
            with pytest.raises(ValueError, match=r"max_new_tokens <= 16 .* found 5 \+ 12: lower max_new_tokens"):
                decode(predictor, [PROMPT], replace(settings, max_new_tokens=12))

    @pytest.mark.parametrize("decode", [decode_autoregressively, decode_speculatively])
    def test_an_empty_prompt_is_refused(self, decode: Decode) -> None:
        with pytest.raises(ValueError, match="at least one token"):
            decode(small(), [PROMPT, []], GenerationSettings())


class TestSlots:
    """Exactness cannot tell whether slots get their own u, position and context; agreement with training can."""

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_slot_logits_are_those_of_training(self, family: str, objective: str) -> None:
        """Of the first pass and of each refinement step, which is conditioned on the draft of the pass before."""
        predictor = small(family, objective)
        settings = GenerationSettings(max_new_tokens=14, window_length=5)
        u = settings.auxiliaries(1, torch.device("cpu"))
        text = torch.cat([torch.tensor([PROMPT]), torch.tensor([reference(predictor, settings)])], dim=1)
        drafts: dict[int, list[Tensor]] = {}

        def compare(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
            (start,) = starts
            first, num_slots = len(PROMPT) + start - 1, auxiliaries.shape[1]
            assert torch.equal(auxiliaries, u[:, start : start + num_slots])
            earlier = drafts.setdefault(start, [])
            of_window = u[:, start - 1 : start + num_slots]
            expected = slot_logits_of_training(predictor, text, first, of_window, earlier[-1] if earlier else None)
            torch.testing.assert_close(slot_logits, expected, atol=1e-4, rtol=1e-4)
            correct = text[:, first + 1 : first + 1 + num_slots]
            # Right in the first window and then wrong; another draft in every refinement step.
            earlier.append((correct + (start > 1) * (len(earlier) + 1)) % VOCABULARY)
            return earlier[-1]

        accelerated(predictor, settings, drafter=compare)
        assert list(drafts) == [1, 7, 9, 11]  # 6 tokens, then 2 a cycle; the last two need no slot
        steps = predictor.num_refinement_steps  # a window of two slots cannot use more than two
        assert [len(passes) for passes in drafts.values()] == [
            1 + steps,
            1 + steps,
            1 + steps,
            1 + min(steps, 2),
        ]

    @pytest.mark.parametrize(("order", "expected"), [("descending", 0.0), ("vocabulary", 0.5), ("embedding", 0.5)])
    def test_greedy_slots_carry_a_likely_u(self, order: str, expected: float) -> None:
        predictor = small()
        settings = GenerationSettings(SamplingConfig(temperature=0, order=order), 6, window_length=4)  # pyright: ignore[reportArgumentType]
        seen: list[float] = []
        hook = predictor.slot_encoder.register_forward_pre_hook(
            lambda _, inputs: seen.extend(inputs[0].flatten().tolist())
        )
        accelerated(predictor, settings, drafter=forced(reference(predictor, settings), 1.0))
        hook.remove()
        assert set(seen) == {expected}


def test_the_decoder_leaves_the_gate_closed_after_an_error() -> None:
    predictor = small()

    def fail(slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        raise RuntimeError("broken drafter")

    with pytest.raises(RuntimeError, match="broken drafter"):
        decode_speculatively(predictor, [PROMPT], GenerationSettings(), drafter=fail)
    assert predictor.gate.state is None
