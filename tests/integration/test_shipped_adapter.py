"""The adapter that ships with the package: it loads, it is exact, and its slots earn their keep."""

import pytest

from ptp_lightning.decoding import Generation
from ptp_lightning.models import ParallelTokenPredictor
from ptp_lightning.pretrained import embedded_folder
from ptp_lightning.sampling import SamplingConfig

PROMPTS = ["def ", "import os\n", "class Error(Exception):\n    "]
SHIPPED_MEGABYTES = 4


@pytest.fixture(scope="module")
def predictor() -> ParallelTokenPredictor:
    return ParallelTokenPredictor.from_pretrained()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_text_is_what_the_base_model_samples(predictor: ParallelTokenPredictor, temperature: float) -> None:
    for seed, prompt in enumerate(PROMPTS):
        sampling = SamplingConfig(temperature=temperature, top_k=50, top_p=0.9)
        fast, reference = (
            predictor.generate(prompt, max_new_tokens=40, sampling=sampling, seed=seed, decoder=name)
            for name in ("speculative", "autoregressive")
        )
        assert fast.token_ids == reference.token_ids


def test_calls_are_saved(predictor: ParallelTokenPredictor) -> None:
    texts: list[Generation] = [predictor.generate(prompt, max_new_tokens=60, seed=1) for prompt in PROMPTS]
    assert sum(text.num_calls for text in texts) < 0.9 * sum(text.num_tokens for text in texts)


def test_size() -> None:
    files = embedded_folder("embedded_adapter").iterdir()
    assert sum(file.stat().st_size for file in files) <= SHIPPED_MEGABYTES * 1e6
