"""Where rounding decides: bfloat16 texts may part from the reference at near-ties only; and samples are samples."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.sampling import Sampler, SamplingConfig
from tests.tiny_decoding import PROMPT, Decode, decode_one
from tests.tiny_predictors import tiny_predictor

VOCABULARY = 32
# Two steps of bfloat16 between 8 and 16, the largest logits here; calls of other shapes round differently by about one.
ROUNDING = 2 * 2.0**-4


def reference_with_logits(
    predictor: ParallelTokenPredictor, settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], Tensor]:
    """The reference text and the logits `[1, T, V]` it was picked from."""
    seen: list[Tensor] = []
    head = predictor.logits
    with monkeypatch.context() as patch:
        patch.setattr(predictor, "logits", lambda hidden: seen.append(head(hidden)) or seen[-1])
        text = decode_one(decode_autoregressively, predictor, settings).token_ids
    return text, torch.cat(seen, dim=1)


def is_near_tie(logits: Tensor, u: Tensor, token_id: int, sampling: Sampler, rounding: float) -> bool:
    """Whether changing no logit `[V]` by more than `rounding` can make u pick `token_id`."""
    vocabulary = logits.shape[-1]
    generator = torch.Generator().manual_seed(0)
    rank = logits.float().argsort(descending=True).argsort()
    tilts = torch.where(rank < torch.arange(vocabulary)[:, None], 1.0, -1.0)  # the best m up, the others down
    places = torch.arange(vocabulary) if sampling.token_places is None else sampling.token_places
    by_place = torch.where(places < torch.arange(vocabulary)[:, None], 1.0, -1.0)
    any_signs = torch.randint(0, 2, (4096, vocabulary), generator=generator) * 2.0 - 1
    changes = torch.cat([tilts, -tilts, by_place, -by_place, any_signs]) * rounding
    picks = pick(u.expand(len(changes)), sampling.distribution(logits.float() + changes))
    return bool((picks == token_id).any())


def deviation_rate(
    predictor: ParallelTokenPredictor,
    sampling: SamplingConfig,
    num_seeds: int,
    rounding: float,
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """Deviations per token of shared context; each is checked to be a near-tie."""
    num_deviations = num_tokens = 0
    for seed in range(num_seeds):
        settings = GenerationSettings(sampling, 24, seed, window_length=6)
        text, logits = reference_with_logits(predictor, settings, monkeypatch)
        found = decode_one(decode_speculatively, predictor, settings).token_ids
        place = next((k for k, pair in enumerate(zip(text, found, strict=True)) if pair[0] != pair[1]), None)
        num_tokens += len(text) if place is None else place + 1
        if place is not None:  # what follows has another context
            num_deviations += 1
            u = settings.auxiliaries(1, torch.device("cpu"))[0][place]
            assert is_near_tie(logits[0, place], u, found[place], predictor.sampler(sampling), rounding), (seed, place)
    return num_deviations / num_tokens


@pytest.mark.parametrize("order", ["descending", "vocabulary", "embedding"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_deviates_at_near_ties_only(family: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, order=order)  # pyright: ignore[reportArgumentType]
    predictor = tiny_predictor(family, sampling=sampling, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    rate = deviation_rate(predictor, sampling, 12, ROUNDING, monkeypatch)
    print(f"bfloat16, {family}, {order} order: {rate:.2%} of tokens deviate")


def test_a_near_tie_is_told_from_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above would be worthless if it explained any token."""
    predictor = tiny_predictor(vocab_size=VOCABULARY, dtype=torch.bfloat16)
    settings = GenerationSettings(SamplingConfig(), 24)
    text, logits = reference_with_logits(predictor, settings, monkeypatch)
    u = settings.auxiliaries(1, torch.device("cpu"))[0]
    sampler = predictor.sampler(settings.sampling)
    explained = [
        is_near_tie(logits[0, k], u[k], other, sampler, ROUNDING)
        for k, token_id in list(enumerate(text))[::4]
        for other in range(VOCABULARY)
        if other != token_id
    ]
    assert sum(explained) < 0.1 * len(explained)
    assert is_near_tie(logits[0, 0], u[0], text[0], sampler, ROUNDING)


@pytest.mark.parametrize(
    "decode", [decode_autoregressively, decode_speculatively, decode_partially_quadratically], ids=lambda d: d.__name__
)
def test_samples_follow_the_base_models_distribution(decode: Decode) -> None:
    """Chi-square over the 64 texts of three tokens out of four."""
    num_samples, length, vocabulary = 1200, 3, 4
    predictor = tiny_predictor(vocab_size=vocabulary, hidden_size=16, num_layers=1, sharpness=1.0)
    sampling = SamplingConfig(temperature=0.8)
    prompt = [token_id % vocabulary for token_id in PROMPT]
    texts = list(product(range(vocabulary), repeat=length))
    inputs = torch.cat([torch.tensor([prompt] * len(texts)), torch.tensor(texts)], dim=1)
    with torch.no_grad():
        logits = predictor.base_model(input_ids=inputs).logits[:, len(prompt) - 1 : -1]
    expected = sampling.distribution(logits).probability_of(torch.tensor(texts)).double().prod(-1) * num_samples
    settings = GenerationSettings(sampling, length, tuple(range(num_samples)))
    found = Counter(tuple(decoded.token_ids) for decoded in decode(predictor, [prompt] * num_samples, settings))
    counts = torch.tensor([found[text] for text in texts], dtype=torch.float64)
    rare = expected < 5  # together one cell
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    degrees = len(expected) - 1
    assert degrees > 15
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)
