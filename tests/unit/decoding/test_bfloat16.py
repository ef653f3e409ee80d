"""In bfloat16, too, every decoder writes the same text: calls of any shape leave a token the same hidden state."""

import pytest
import torch

from ptp_lightning.decoding import GenerationSettings, decode_partially_quadratically, decode_speculatively
from ptp_lightning.decoding.context import BatchContext
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.steady_attention import NAME, steady_attention
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.checkpoint import load_predictor
from ptp_lightning.sampling import SamplingConfig
from tests.tiny_decoding import PROMPT, Decode, decode_one, reference
from tests.tiny_models import cast_weights, tiny_llama
from tests.tiny_predictors import tiny_predictor

VOCABULARY = 32
NUM_SEEDS = 4


@pytest.mark.parametrize("decode", [decode_speculatively, decode_partially_quadratically], ids=lambda d: d.__name__)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_texts_are_the_reference_texts(family: str, decode: Decode) -> None:
    """Without `steady_attention`, 0.6 to 0.9 % of these tokens differ."""
    sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
    predictor = tiny_predictor(family, sampling=sampling, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    for seed in range(NUM_SEEDS):
        settings = GenerationSettings(sampling, 32, seed, window_length=6)
        assert decode_one(decode, predictor, settings).token_ids == reference(predictor, settings)


@torch.inference_mode()
def test_hidden_states_of_the_shipped_model_do_not_depend_on_the_shape_of_the_call() -> None:
    """Bit for bit, with trained weights: a token alone, before a draft, and before a draft and slots."""
    predictor = load_predictor(backbone=BackboneSettings(dtype="bfloat16"))
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


def test_the_models_own_attention_comes_back() -> None:
    model = cast_weights(tiny_llama(), torch.bfloat16)
    before = model.config._attn_implementation

    def interrupted() -> None:
        with steady_attention(model):
            assert model.config._attn_implementation == NAME
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == before


def test_float32_stays_as_it_is() -> None:
    model = tiny_llama()
    with steady_attention(model):
        assert model.config._attn_implementation == "sdpa"


def test_attention_is_what_it_was_up_to_rounding() -> None:
    model = cast_weights(tiny_llama(), torch.bfloat16)
    token_ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        with steady_attention(model):
            torch.testing.assert_close(model(input_ids=token_ids).logits, expected, atol=0.05, rtol=0.02)
