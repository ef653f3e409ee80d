"""Several prompts side by side: each text is what it is alone, with every decoder."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import Decode, decode_one, reference
from tests.helpers.tiny_predictors import STUDENTS, tiny_predictor

VOCABULARY = 32
PROMPTS = [[3, 1, 4, 1, 5], [7], [2, 2, 9, 8, 1, 0, 3, 3], [7], [5, 5]]
DECODERS: dict[str, Decode] = {
    "autoregressive": decode_autoregressively,
    "speculative": decode_speculatively,
    "partial_quadratic": decode_partially_quadratically,
}
by_decoder = pytest.mark.parametrize("decoder", DECODERS)


@cache
def small(family: str = "llama", student: str = "gated_lora") -> PredictorNetwork:
    """Decoding changes nothing in a predictor, so tests share them."""
    return tiny_predictor(family, vocab_size=VOCABULARY, student=student)


class TextsByPrompt:
    """Right and wrong drafts for rows that come and go; `rows` says which are left."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.rows: list[int] = []

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        offsets = range(auxiliaries.shape[1])
        rows = [[self.texts[row], start] for row, start in zip(self.rows, starts, strict=True)]
        drafts = [[[*text, *[0] * 99][start + k] for k in offsets] for text, start in rows]
        wrong = [[(start + k) % 4 == row % 4 for k in offsets] for row, (_, start) in zip(self.rows, rows, strict=True)]
        return (torch.tensor(drafts) + torch.tensor(wrong)) % VOCABULARY


@one_in(3, decoder=DECODERS, family=["llama", "gpt2", "gpt_neox"], student=STUDENTS)
def test_a_batch_is_its_rows(decoder: str, family: str, student: str) -> None:
    predictor, decode = small(family, student), DECODERS[decoder]
    settings = GenerationSettings(SamplingConfig(0.7, 50, 0.9), 21, seed=3, window_length=6)
    alone = [decode_one(decode, predictor, settings, prompt) for prompt in PROMPTS]
    together = decode(predictor, PROMPTS, settings)
    for found, expected, prompt in zip(together, alone, PROMPTS, strict=True):
        assert found.token_ids == expected.token_ids == reference(predictor, settings, prompt)
        # Drafts are the same as well, but for the last: its length is that of the row with most tokens to come.
        assert found.correct_per_cycle[:-1] == expected.correct_per_cycle[: len(found.correct_per_cycle) - 1]


@by_decoder
def test_rows_end_on_their_own(decoder: str) -> None:
    predictor, decode = small(), DECODERS[decoder]
    settings = GenerationSettings(max_new_tokens=24, seed=1, window_length=6)
    texts = [reference(predictor, settings, prompt) for prompt in PROMPTS]
    settings = replace(settings, end_of_text=frozenset({texts[0][2], texts[2][9]}))
    expected = [reference(predictor, settings, prompt) for prompt in PROMPTS]
    assert len({len(text) for text in expected}) > 1
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    together = decode(predictor, PROMPTS, settings, lambda row, token_ids: streamed[row].extend(token_ids))
    assert [found.token_ids for found in together] == expected == streamed
    assert [found.finish_reason for found in together] == ["eos" if len(text) < 24 else "length" for text in expected]
    assert len({found.num_calls for found in together}) > 1


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("decode", [decode_speculatively, decode_partially_quadratically])
def test_rows_that_accept_different_numbers(decode: Decode, student: str) -> None:
    """Drafts are forced, so that rows drift apart for certain."""
    predictor = small(student=student)
    settings = GenerationSettings(max_new_tokens=22, seed=1, window_length=5)
    texts = [reference(predictor, settings, prompt) for prompt in PROMPTS]
    drafter = TextsByPrompt(texts)
    drafter.rows = list(range(len(PROMPTS)))
    done = [0] * len(PROMPTS)

    def count(row: int, token_ids: list[int]) -> None:
        done[row] += len(token_ids)
        drafter.rows = [row for row, length in enumerate(done) if length < settings.max_new_tokens]

    together = decode(predictor, PROMPTS, settings, count, drafter)
    assert [found.token_ids for found in together] == texts
    assert len({tuple(found.correct_per_cycle) for found in together}) > 2


@by_decoder
def test_each_prompt_may_have_its_own_seed(decoder: str) -> None:
    predictor, decode = small(), DECODERS[decoder]
    settings = GenerationSettings(SamplingConfig(), 15, seed=(4, 9, 4), window_length=6)
    found = [decoded.token_ids for decoded in decode(predictor, [PROMPTS[0]] * 3, settings)]
    assert found == [reference(predictor, replace(settings, seed=seed), PROMPTS[0]) for seed in (4, 9, 4)]
    assert found[0] == found[2] != found[1]
    with pytest.raises(ValueError, match="one for each of 2 prompts, found 3: set seed"):
        decode(predictor, PROMPTS[:2], settings)


@by_decoder
def test_no_prompt_is_refused(decoder: str) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        DECODERS[decoder](small(), [], GenerationSettings())
