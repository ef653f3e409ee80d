"""In bfloat16, too, every decoder writes the same text: calls of any shape leave a token the same hidden state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ptp_lightning.decoding import (
    GenerationSettings,
    batch_invariance,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.decoding.batch_invariance import ATTENTION_NAME, batch_invariant
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, Decode, decode_one, reference
from tests.helpers.tiny_models import cast_weights, tiny_llama
from tests.helpers.tiny_predictors import tiny_predictor

VOCABULARY = 32
NUM_SEEDS = 4


@one_in(
    2,
    family=["llama", "qwen2", "gpt2", "gpt_neox"],
    decode=[decode_speculatively, decode_partially_quadratically],
)
def test_texts_are_the_reference_texts(family: str, decode: Decode) -> None:
    """Without `batch_invariant`, 0.6 to 0.9 % of these tokens differ."""
    sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
    predictor = tiny_predictor(family, sampling=sampling, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    for seed in range(NUM_SEEDS):
        settings = GenerationSettings(sampling, 32, seed, window_length=6)
        assert decode_one(decode, predictor, settings).token_ids == reference(predictor, settings)


@torch.inference_mode()
def test_hidden_states_of_the_shipped_model_do_not_depend_on_the_shape_of_the_call() -> None:
    """Bit for bit, with trained weights: a token alone, before a draft, and before a draft and slots."""
    network = load_network(dtype="bfloat16")
    with prepare_for_decoding(network):
        check_hidden_states(network)


def check_hidden_states(predictor: PredictorNetwork) -> None:
    token_ids = torch.randint(5, 2000, (1, 120), generator=torch.Generator().manual_seed(0))
    settings = GenerationSettings(window_length=4)
    for length in range(60, 110, 10):
        hidden = []
        for num_tokens, slots in ((1, [0]), (4, [0] * 4), (3, [3, 2, 1])):
            context = BatchContext(predictor, settings, [length])
            context.read(token_ids[:, :length])
            context.keep([length])
            lookahead = Lookahead.branches([1], [slots], context.device)
            read, _ = context.read(token_ids[:, length : length + num_tokens], lookahead)
            hidden.append(read[:, 0])
        assert all(torch.equal(other, hidden[0]) for other in hidden[1:])


class LikeAGpu(TorchFunctionMode):
    """A device on which the number of rows decides in which order a kernel adds up, but not in float64.

    Here it makes every sum larger or smaller, by up to two hundredths.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in SUMS or result.dtype == torch.float64:
            return result
        rows = args[SUMS[func]]
        return result * (1 + (rows.numel() // rows.shape[-1] * 37 % 16 - 8) / 400)


SUMS = {F.linear: 0, torch.addmm: 1, Tensor.mean: 0, F.scaled_dot_product_attention: 0}
"""And which of their arguments has the rows."""


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("is_known", [True, False])
@torch.inference_mode()
def test_the_number_of_rows_does_not_matter(family: str, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor to logits, if it is known that it would; else it does."""
    monkeypatch.setattr(batch_invariance, "_products_depend_on_rows", lambda model: is_known)
    monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model: False)  # as on a GPU
    predictor = tiny_predictor(family, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    token_ids = torch.randint(VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(0))
    results = []
    for num_read, num_tokens, slots in ((7, 1, [0]), (7, 4, [0] * 4), (7, 3, [3, 2, 1]), (1, 93, [0] * 93)):
        context = BatchContext(predictor, GenerationSettings(window_length=4), [num_read])
        with LikeAGpu():
            context.read(token_ids[:, :num_read])
            context.keep([num_read])
            lookahead = Lookahead.branches([1], [slots], context.device)
            hidden, _ = context.read(token_ids[:, num_read : num_read + num_tokens], lookahead)
            logits = context.logits(hidden)
        results += [hidden[:, 7 - num_read], logits[:, 7 - num_read]]
    assert all(torch.equal(other, first) for other, first in zip(results[2:], results * 3, strict=False)) == is_known


# In CI with branches alone: its calls have all shapes of speculative decoding.
@pytest.mark.parametrize(
    "decode", [pytest.param(decode_speculatively, marks=pytest.mark.slow), decode_partially_quadratically]
)
def test_texts_on_a_device_where_it_would(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_invariance, "_products_depend_on_rows", lambda model: True)
    monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model: False)
    sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
    predictor = tiny_predictor(sampling=sampling, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    for seed in range(NUM_SEEDS):
        settings = GenerationSettings(sampling, 32, seed, window_length=6)
        with LikeAGpu():
            assert decode_one(decode, predictor, settings).token_ids == reference(predictor, settings)


def test_the_models_own_attention_comes_back() -> None:
    model = cast_weights(tiny_llama(), torch.bfloat16)
    before = model.config._attn_implementation

    def interrupted() -> None:
        with batch_invariant(model):
            assert model.config._attn_implementation == ATTENTION_NAME
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == before


def test_float32_stays_as_it_is_on_other_devices() -> None:
    model = tiny_llama().to("meta")
    with batch_invariant(model):
        assert model.config._attn_implementation == "sdpa"


def test_masks_of_numbers_are_read_in_the_dtype_of_the_queries() -> None:
    """A CPU's kernels read a float32 mask beside float64 queries wrongly from 16 columns on, without an error."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3))
    mask = torch.randn(1, 2, 20, 20, generator=generator)
    attended, _ = batch_invariance._attend(torch.nn.Module(), query, key, value, mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attended, expected.transpose(1, 2))


def test_attention_is_what_it_was_up_to_rounding() -> None:
    model = cast_weights(tiny_llama(), torch.bfloat16)
    token_ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        with batch_invariant(model):
            torch.testing.assert_close(model(input_ids=token_ids).logits, expected, atol=0.05, rtol=0.02)
