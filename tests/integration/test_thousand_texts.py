"""A thousand texts of several models, seeds and settings, in each dtype: decoders write what one token a call does.

Run with `pytest -n 0 -m slow -s tests/integration/test_thousand_texts.py`, which prints the counts.
"""

import pytest
import torch

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.evaluation.near_ties import first_difference, is_explained_by_rounding
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_predictors import tiny_predictor

NUM_TEXTS = 1000
SAMPLING = (
    SamplingConfig(),
    SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
    SamplingConfig(temperature=1.2, top_p=0.95, order="descending"),
    SamplingConfig(temperature=0),
)
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
PROMPTS = ([9, 14, 6, 11, 20], [7] * 40, [31, 5], list(range(1, 31)), [12, 8, 8])


def predictors(dtype: str) -> list[PredictorNetwork]:
    """The shipped adapter with its trained model, and tiny ones of each family."""
    tiny = [tiny_predictor(family, dtype=getattr(torch, dtype)) for family in FAMILIES]
    return [load_network(dtype=dtype), *tiny]  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "most"), [("float32", 0), ("bfloat16", NUM_TEXTS // 100)])
def test_texts_are_the_reference_texts(dtype: str, most: int) -> None:
    models = predictors(dtype)
    rows = NUM_TEXTS // (len(models) * len(SAMPLING))
    deviating: set[tuple[int, int, int]] = set()
    for number, predictor in enumerate(models):
        for setting, sampling in enumerate(SAMPLING):
            prompts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
            settings = GenerationSettings(sampling, 24, tuple(range(rows)), window_length=5, slot_budget=12)
            references = decode_autoregressively(predictor, prompts, settings)
            for decode in (decode_speculatively, decode_partially_quadratically):
                for row, (found, expected) in enumerate(
                    zip(decode(predictor, prompts, settings), references, strict=True)
                ):
                    place = first_difference(found.token_ids, expected.token_ids)
                    if place is not None:
                        deviating.add((number, setting, row))
                        of_row = GenerationSettings(sampling, 24, row)
                        token_id = found.token_ids[place]
                        assert is_explained_by_rounding(
                            predictor, prompts[row], expected.token_ids, place, token_id, of_row
                        )
    total = rows * len(models) * len(SAMPLING)
    print(f"{dtype}: {len(deviating)} of {total} texts deviate")
    assert total == NUM_TEXTS
    assert len(deviating) <= most
