"""A thousand texts of several models, seeds and settings, in each dtype: decoders write what one token a call does.

No text may deviate, near-ties included. Run with `pytest -n 0 -m slow -s tests/integration/test_thousand_texts.py`,
which prints the counts.
"""

import pytest
import torch

from ptp_lightning.decoding import DECODERS, GenerationSettings, decode_autoregressively
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_predictors import REFINER, tiny_predictor

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
    # Half of them draft trees of tokens, which a refiner cannot.
    tiny = [
        tiny_predictor(family, dtype=getattr(torch, dtype), correction=correction)
        for family, correction in zip(FAMILIES, (REFINER, None) * 2, strict=True)
    ]
    return [load_network(dtype=dtype), *tiny]  # pyright: ignore[reportArgumentType]


def count_deviating(predictor: PredictorNetwork, sampling: SamplingConfig, num_texts: int, batch_size: int) -> int:
    """Texts of any decoder, in batches, that are not what the base model writes alone with one token a call."""
    deviating = 0
    for first in range(0, num_texts, batch_size):
        seeds = tuple(range(first, min(first + batch_size, num_texts)))
        prompts = [PROMPTS[seed % len(PROMPTS)] for seed in seeds]
        references = [
            decode_autoregressively(predictor, [prompt], GenerationSettings(sampling, 24, seed))[0].token_ids
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        settings = GenerationSettings(sampling, 24, seeds, window_length=5, slot_budget=12, num_draft_tokens=8)
        decoders = [
            decode
            for name, decode in DECODERS.items()
            if name != "partial_quadratic" or not predictor.first_slot_layer  # which late slots do not allow
        ]
        texts = [[decoded.token_ids for decoded in decode(predictor, prompts, settings)] for decode in decoders]
        deviating += sum(
            any(other != text for other in others) for text, *others in zip(references, *texts, strict=True)
        )
    return deviating


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_the_reference_texts(dtype: str) -> None:
    models = predictors(dtype)
    num_texts = NUM_TEXTS // (len(models) * len(SAMPLING))
    deviating = {
        (number, setting): count_deviating(predictor, sampling, num_texts, batch_size=1 + (number + setting) % 8)
        for number, predictor in enumerate(models)
        for setting, sampling in enumerate(SAMPLING)
    }
    print(f"{dtype}: {sum(deviating.values())} of {num_texts * len(deviating)} texts deviate")
    assert num_texts * len(deviating) == NUM_TEXTS
    assert not any(deviating.values()), deviating


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["trained", "random"])
def test_texts_of_smollm2_are_the_reference_texts(adapter: str, dtype: str) -> None:
    """A wide vocabulary, which has many borders; needs the package that carries the model.

    The trained adapter has a slot without layers, the random one slots in all of them.
    """
    try:
        if adapter == "trained":
            predictor = load_network("smollm2", dtype=dtype).eval()  # pyright: ignore[reportArgumentType]
        else:
            config = PredictorConfig(BackboneSettings("smollm2", dtype), lora=LoraSettings(rank=8))  # pyright: ignore
            predictor = PredictorNetwork(config).eval()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    for name, parameter in predictor.named_parameters():
        if adapter != "trained" and "lora_B" in name:
            parameter.data.normal_(std=0.002)
    deviating = [count_deviating(predictor, sampling, 12, batch_size) for sampling in SAMPLING for batch_size in (1, 5)]
    assert deviating == [0] * len(deviating)
