"""The cached context: what a propose call leaves of the base model's own hidden states, and of the cache."""

import pytest
import torch

from ptp_lightning.decoding.generation import CachedContext
from tests.tiny_predictors import tiny_predictor

INPUT_IDS = torch.tensor([[5, 9, 7, 3, 8, 2, 6]])
U = torch.tensor([[0.05, 0.35, 0.65, 0.95]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_context_tokens_of_a_propose_call_keep_their_bits(dtype: torch.dtype) -> None:
    """Slots stand in the same call with the gate open, and are refined; the tokens before them must not notice."""
    predictor = tiny_predictor(dtype=dtype)
    context = CachedContext(predictor, predictor.config.sampling)
    hidden = context.read(INPUT_IDS, U)
    decoder = predictor.base_model.get_submodule(predictor.base_model.base_model_prefix)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
    slots = predictor.slot_encoder(U).to(dtype)
    with predictor.gate.closed():  # the same call shape, without the adapter
        expected = decoder(
            inputs_embeds=torch.cat([predictor.embed(INPUT_IDS), slots], dim=1),
            position_ids=torch.arange(10).unsqueeze(0),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
    assert torch.equal(hidden[:, :7], expected[:, :7])
    assert not torch.equal(hidden[:, 7:], expected[:, 7:])

    keys = [layer.keys.clone() for layer in context.cache.layers]  # pyright: ignore
    refined = context.refine(hidden[:, 7:], INPUT_IDS[:, :3])
    assert refined.dtype == dtype and not torch.equal(refined, hidden[:, 7:])
    assert context.length == 7 and context.num_calls == 1
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(context.cache.layers, keys, strict=True))  # pyright: ignore
