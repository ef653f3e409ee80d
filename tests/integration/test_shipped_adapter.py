"""The adapter that ships with the package: it loads, it is exact, and its slots earn their keep."""

import pytest

from ptp_lightning import ParallelTokenPredictor
from ptp_lightning.decoding import CorrectLengths, generate_batch
from ptp_lightning.option_names import DecoderName
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.pretrained import embedded_folder
from tests.helpers.parameter_products import one_in

PROMPTS = ["def ", "import os\n", "class Error(Exception):\n    "]
SHIPPED_MEGABYTES = 4


@pytest.fixture(scope="module")
def predictor() -> ParallelTokenPredictor:
    return ParallelTokenPredictor.from_pretrained()


@one_in(3, temperature=[0.0, 0.7, 1.0], prompt=range(len(PROMPTS)))
def test_text_is_what_the_base_model_samples(
    predictor: ParallelTokenPredictor, temperature: float, prompt: int
) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=50, top_p=0.9)
    reference, *fast = (
        predictor.generate(PROMPTS[prompt], max_new_tokens=40, sampling=sampling, seed=prompt, decoder=name).token_ids
        for name in ("autoregressive", "speculative", "partial_quadratic")
    )
    assert fast == [reference, reference]


@pytest.mark.parametrize(("decoder", "tokens_per_call"), [("speculative", 1.1), ("partial_quadratic", 1.6)])
def test_calls_are_saved(predictor: ParallelTokenPredictor, decoder: DecoderName, tokens_per_call: float) -> None:
    texts = generate_batch(predictor.network, PROMPTS, max_new_tokens=60, seed=1, decoder=decoder)
    assert sum(text.num_tokens for text in texts) > tokens_per_call * sum(text.num_calls for text in texts)


def test_its_validation_is_known(predictor: ParallelTokenPredictor) -> None:
    assert CorrectLengths.from_validation(predictor.network.prefix_counts, 7).expected(7) == pytest.approx(
        1.651, abs=1e-3
    )  # docs/results/training.md


def test_size() -> None:
    files = embedded_folder("embedded_adapter").iterdir()
    assert sum(file.stat().st_size for file in files) <= SHIPPED_MEGABYTES * 1e6
