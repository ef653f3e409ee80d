"""The reference decoder against the plain transformers model, which knows nothing of adapters, caches or u."""

import pytest
import torch

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.decoding import GenerationSettings, decode_autoregressively
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_decoding import PROMPT, decode_one
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_predictors import sharpen, tiny_predictor

INPUT_IDS = torch.tensor([PROMPT])
SHARPNESS = 2.0


@pytest.mark.parametrize("family", TINY_MODELS)
class TestReference:
    def test_tokens_are_what_u_picks_from_the_base_model(self, family: str) -> None:
        sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
        settings = GenerationSettings(sampling, max_new_tokens=20, seed=3)
        decoded = decode_one(decode_autoregressively, tiny_predictor(family, sharpness=SHARPNESS), settings)

        base = TINY_MODELS[family]()
        sharpen(base, SHARPNESS)
        text = torch.cat([INPUT_IDS, torch.tensor([decoded.token_ids])], dim=1)
        with torch.no_grad():
            logits = base(input_ids=text).logits[0, len(PROMPT) - 1 : -1]
        u = draw_auxiliaries((20,), keyed_generator(3, "generate"), "cpu")
        assert decoded.token_ids == pick(u, sampling.distribution(logits)).tolist()
        assert (decoded.num_calls, decoded.finish_reason, decoded.correct_per_cycle) == (20, "length", [])

    def test_greedy_is_transformers_greedy(self, family: str) -> None:
        settings = GenerationSettings(SamplingConfig(temperature=0), max_new_tokens=12)
        decoded = decode_one(decode_autoregressively, tiny_predictor(family, sharpness=SHARPNESS), settings)

        base = TINY_MODELS[family]()
        sharpen(base, SHARPNESS)
        expected = base.generate(INPUT_IDS, do_sample=False, max_new_tokens=12, eos_token_id=None)  # pyright: ignore[reportCallIssue]
        assert decoded.token_ids == expected[0, len(PROMPT) :].tolist()


class TestSettings:
    def test_a_longer_text_begins_with_the_shorter_one(self) -> None:
        predictor = tiny_predictor()
        short, long = (
            decode_one(decode_autoregressively, predictor, GenerationSettings(max_new_tokens=n)).token_ids
            for n in (5, 40)
        )
        assert long[:5] == short

    def test_the_seed_decides(self) -> None:
        predictor = tiny_predictor()
        texts = [
            tuple(decode_one(decode_autoregressively, predictor, GenerationSettings(seed=seed)).token_ids)
            for seed in (0, 0, 1)
        ]
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize(
        "options", [{"max_new_tokens": 0}, {"max_new_tokens": -3}, {"window_length": 1}, {"slot_budget": 0}]
    )
    def test_values_out_of_range_are_named(self, options: dict[str, int]) -> None:
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} >="):
            GenerationSettings(**options)  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("name", ["window_length", "slot_budget"])
    def test_more_slots_than_any_memory_holds_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"expected {name} <= 4096, found 1000000000"):
            GenerationSettings(**{name: 10**9})  # pyright: ignore[reportArgumentType]


class TestEnd:
    def test_the_end_of_text_token_is_the_last(self) -> None:
        predictor = tiny_predictor()
        text = decode_one(decode_autoregressively, predictor, GenerationSettings(max_new_tokens=30)).token_ids
        end = text[11]
        settings = GenerationSettings(max_new_tokens=30, end_of_text=frozenset({end, -1}))
        decoded = decode_one(decode_autoregressively, predictor, settings)
        assert decoded.token_ids == text[: text.index(end) + 1]
        assert decoded.finish_reason == "eos"

    def test_an_end_at_the_last_position_counts_as_eos(self) -> None:
        predictor = tiny_predictor()
        text = decode_one(decode_autoregressively, predictor, GenerationSettings(max_new_tokens=30)).token_ids
        first = text.index(text[11])
        settings = GenerationSettings(max_new_tokens=first + 1, end_of_text=frozenset({text[11]}))
        assert decode_one(decode_autoregressively, predictor, settings).finish_reason == "eos"
