"""What decoders write is distributed as the base model says."""

import math
from collections import Counter
from itertools import product

import pytest
import torch

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_decoding import PROMPT, Decode
from tests.helpers.tiny_predictors import tiny_predictor


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
