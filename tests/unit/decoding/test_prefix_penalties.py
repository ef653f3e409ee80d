"""Penalties and min-p: every decoder writes the reference text, and greedy texts are those of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_by_lookup,
    decode_partially_quadratically,
    decode_speculatively,
    generate,
)
from ptp_lightning.decoding.model_settings import with_model_settings
from ptp_lightning.decoding.prefix_penalties import penalized
from ptp_lightning.generation.comparison import generate_arguments
from ptp_lightning.models.backbone import BackboneSettings, load_backbone
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, Decode, ForcedDraft, decode_one
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import tiny_predictor

VOCABULARY = 32
PROMPTS = [PROMPT, [7], [2, 9, 2, 9, 2, 9, 2]]
DECODERS = [decode_autoregressively, decode_speculatively, decode_partially_quadratically]
PENALTIES = {
    "repetition": {"repetition_penalty": 1.3},
    "n-grams": {"no_repeat_ngram_size": 2},
    "both": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
    "reward": {"repetition_penalty": 0.7},
}


@cache
def small(objective: str = "categorical", **options: Any) -> PredictorNetwork:
    return tiny_predictor("llama", objective, SamplingConfig(), vocab_size=VOCABULARY, eos_token_id=None, **options)


def transformers_text(predictor: PredictorNetwork, prompt: Sequence[int], settings: GenerationSettings) -> list[int]:
    """What `generate` of transformers writes."""
    model: Any = predictor.base_model
    input_ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **generate_arguments(settings))
    return output[0, len(prompt) :].tolist()


def expected_reference(predictor: PredictorNetwork, prompt: Sequence[int], settings: GenerationSettings) -> list[int]:
    """The one-token loop, with the logits processors of transformers, of whole prefixes without a cache."""
    sampling = settings.sampling
    auxiliaries = settings.auxiliaries(1, torch.device("cpu"))[0]
    token_ids = list(prompt)
    for u in auxiliaries:
        with torch.inference_mode():
            logits = predictor.base_model(torch.tensor([token_ids])).logits[:, -1]
        prefix: Any = torch.tensor([token_ids])
        if sampling.repetition_penalty:
            logits = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(prefix, logits)
        if sampling.no_repeat_ngram_size:
            logits = NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size)(prefix, logits)
        logits = logits / sampling.temperature
        if sampling.min_p:
            logits = MinPLogitsWarper(sampling.min_p)(prefix, logits)  # pyright: ignore[reportArgumentType]
        cdf = logits.softmax(-1).double().cumsum(-1)[0]
        token_ids.append(int((cdf / cdf[-1] <= u).sum()))
    return token_ids[len(prompt) :]


class TestTexts:
    @one_in(2, decode=[*DECODERS, decode_by_lookup], name=PENALTIES)
    def test_greedy_texts_are_those_of_transformers(self, decode: Decode, name: str) -> None:
        """Of several prompts side by side."""
        settings = GenerationSettings(SamplingConfig(temperature=0, **PENALTIES[name]), 24, window_length=5)
        for decoded, prompt in zip(decode(small(), PROMPTS, settings), PROMPTS, strict=True):
            assert decoded.token_ids == transformers_text(small(), prompt, settings)

    @one_in(2, decode=[*DECODERS, decode_by_lookup], name=PENALTIES)
    def test_sampled_texts_are_those_of_the_one_token_loop(self, decode: Decode, name: str) -> None:
        settings = GenerationSettings(SamplingConfig(0.8, min_p=0.05, **PENALTIES[name]), 24, seed=3, window_length=5)
        for decoded, prompt in zip(decode(small(), PROMPTS, settings), PROMPTS, strict=True):
            assert decoded.token_ids == expected_reference(small(), prompt, settings)

    @hypothesis_settings(max_examples=12, deadline=None)
    @given(
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        min_p=st.sampled_from([None, 0.1, 1.0]),
        repetition_penalty=st.sampled_from([None, 0.8, 1.2, 3.0]),
        no_repeat_ngram_size=st.sampled_from([None, 0, 1, 2, 3]),
        top_p=st.sampled_from([1.0, 0.9]),
        acceptance_rate=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        window_length=st.integers(2, 7),
        seed=st.integers(0, 3),
    )
    def test_adversarial_drafts_change_nothing(
        self, acceptance_rate: float, window_length: int, seed: int, **sampling: Any
    ) -> None:
        # 5 + 20 tokens leave some of the 32 for n-grams of size 1.
        settings = GenerationSettings(SamplingConfig(**sampling), 20, seed, window_length=window_length, slot_budget=7)
        (expected,) = (one.token_ids for one in decode_autoregressively(small(), [PROMPT], settings))
        for decode in DECODERS[1:]:
            drafter = ForcedDraft([expected], acceptance_rate, VOCABULARY)
            assert decode_one(decode, small(), settings, drafter=drafter).token_ids == expected

    @pytest.mark.parametrize("objective", ["categorical", "one_hot", "independent"])
    def test_with_a_draft_vocabulary(self, objective: str) -> None:
        predictor = small(objective, draft_vocabulary=(0, 3, 4, 7, 11, 20, 21, 30))
        settings = GenerationSettings(SamplingConfig(0.8, repetition_penalty=1.3), 24, window_length=5)
        expected = decode_one(decode_autoregressively, predictor, settings).token_ids
        assert all(decode_one(decode, predictor, settings).token_ids == expected for decode in DECODERS[1:])

    def test_neutral_values_are_no_penalties(self) -> None:
        neutral = SamplingConfig(0.8, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0)
        texts = [
            decode_one(decode_speculatively, small(), GenerationSettings(sampling, 24)).token_ids
            for sampling in (neutral, SamplingConfig(0.8))
        ]
        assert texts[0] == texts[1] and not neutral.depends_on_prefix


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    prefix=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    logits=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0]), min_size=6, max_size=6),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    size=st.integers(0, 4),
)
def test_logits_are_those_of_the_processors(prefix: list[int], logits: list[float], penalty: float, size: int) -> None:
    input_ids: Any = torch.tensor([prefix])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(input_ids, torch.tensor([logits]))
    if size:
        expected = NoRepeatNGramLogitsProcessor(size)(input_ids, expected)
    settings = SamplingConfig(repetition_penalty=penalty, no_repeat_ngram_size=size)
    assert torch.equal(penalized(torch.tensor(logits), torch.tensor(prefix), settings), expected[0])


class TestDrafts:
    def test_are_penalised_like_the_text(self) -> None:
        """A student that copies the base model's logits: without penalties its drafts would repeat tokens."""
        predictor = small()
        settings = GenerationSettings(SamplingConfig(temperature=0, repetition_penalty=50.0), 20, window_length=4)
        drafts: list[torch.Tensor] = []

        def remember(slot_logits: torch.Tensor, auxiliaries: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
            drafts.append(slot_logits)
            return slot_logits.argmax(-1)

        decode_one(decode_speculatively, predictor, settings, drafter=remember)
        penalised = torch.cat(drafts, dim=1)[0]
        drafts.clear()
        free = GenerationSettings(SamplingConfig(temperature=0, repetition_penalty=1.0), 20, window_length=4)
        decode_one(decode_speculatively, predictor, free, drafter=remember)
        first, of_free = penalised[0], torch.cat(drafts, dim=1)[0, 0]
        changed = (first != of_free).nonzero().flatten().tolist()
        assert set(PROMPT) <= set(changed) and len(changed) <= len(set(PROMPT)) + 1  # and the first token


class TestModelSettings:
    """What `generation_config.json` of the base model's folder says."""

    @pytest.fixture
    def predictor(self) -> PredictorNetwork:
        return tiny_predictor(vocab_size=257, sampling=SamplingConfig(temperature=0.7), eos_token_id=None)

    def test_open_values_are_taken_from_it(self, predictor: PredictorNetwork) -> None:
        config: Any = predictor.base_model.generation_config
        config.repetition_penalty, config.min_p = 1.3, 0.1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = with_model_settings(predictor, SamplingConfig(0.5, min_p=0.0))
        assert found == SamplingConfig(0.5, min_p=0.0, repetition_penalty=1.3)

    @pytest.mark.parametrize("decoder", ["autoregressive", "speculative", "speculative_lookup", "partial_quadratic"])
    def test_generate_equals_that_of_transformers(self, predictor: PredictorNetwork, decoder: Any) -> None:
        config: Any = predictor.base_model.generation_config
        config.repetition_penalty = 1.3
        text = generate(
            predictor, PROMPT, sampling=SamplingConfig(temperature=0), decoder=decoder, tokenizer=byte_tokenizer()
        )
        model: Any = predictor.base_model
        output = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=64, eos_token_id=0)
        assert text.token_ids == output[0, len(PROMPT) :].tolist()

    def test_others_are_named_in_one_warning(self, predictor: PredictorNetwork) -> None:
        config: Any = predictor.base_model.generation_config
        config.suppress_tokens, config.typical_p, config.min_new_tokens, config.num_beams = [7], 0.9, 0, 1
        with pytest.warns(UserWarning, match=r"settings typical_p, suppress_tokens of the base model's") as warned:
            with_model_settings(predictor, SamplingConfig())
        assert len(warned) == 1

    def test_settings_that_differ_from_those_of_the_adapter_are_named(self, predictor: PredictorNetwork) -> None:
        """Both values, in one warning; texts follow the adapter."""
        config: Any = predictor.base_model.generation_config
        config.temperature, config.top_k, config.top_p = 0.3, 0, 0.9
        message = (
            "^texts are sampled with temperature 0.7, top_p 1.0, as the adapter was trained, not with temperature 0.3, "
            "top_p 0.9 of the base model's folder .generation_config.json.: give sampling to choose$"
        )
        with pytest.warns(UserWarning, match=message) as warned:
            text = generate(predictor, PROMPT, max_new_tokens=4, tokenizer=byte_tokenizer())
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            chosen = generate(
                predictor, PROMPT, max_new_tokens=4, tokenizer=byte_tokenizer(), sampling=predictor.config.sampling
            )
        assert chosen.token_ids == text.token_ids

    def test_of_a_folder(self, tmp_path: Path) -> None:
        model: Any = tiny_llama(vocab_size=257)
        model.generation_config.repetition_penalty = 1.1
        model.save_pretrained(tmp_path)
        loaded: Any = load_backbone(BackboneSettings(path=str(tmp_path))).generation_config
        assert loaded.repetition_penalty == 1.1
