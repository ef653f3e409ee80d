"""The context of a batch: a drafting call leaves the base model's own hidden states and the cache as they are."""

import pytest
import torch

from ptp_lightning.decoding.batch_invariance import batch_invariant
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.state import BatchContext
from tests.helpers.tiny_predictors import tiny_predictor

INPUT_IDS = torch.tensor([[5, 9, 7, 3, 8, 2, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_context_tokens_of_a_drafting_call_keep_their_bits(dtype: torch.dtype) -> None:
    """Slots stand in the same call with the gate open, and are refined; the tokens before them must not notice."""
    predictor = tiny_predictor(dtype=dtype)
    settings = GenerationSettings(predictor.config.sampling)
    context = BatchContext(predictor, settings, [7])
    u = context.auxiliaries([0], 4)
    hidden, slot_hidden = context.read(INPUT_IDS, Lookahead.single([7], 3, context.device))
    decoder = predictor.base_model.get_submodule(predictor.base_model.base_model_prefix)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
    slots = predictor.slot_encoder(u).to(dtype)
    with predictor.gate.closed(), batch_invariant(predictor.base_model):  # the same call shape, without the adapter
        expected = decoder(
            inputs_embeds=torch.cat([predictor.embed(INPUT_IDS), slots], dim=1),
            position_ids=torch.arange(10).unsqueeze(0),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
    assert torch.equal(hidden, expected[:, :7])
    assert not torch.equal(slot_hidden, expected[:, 7:])

    context.keep([7])
    refined = context.correct(slot_hidden, INPUT_IDS[:, :3])
    assert refined.dtype == dtype and not torch.equal(refined, slot_hidden)
    assert context.num_calls == 1
    again, _ = context.read(INPUT_IDS[:, :2])
    text = torch.cat([INPUT_IDS, INPUT_IDS[:, :2]], dim=1)
    with predictor.gate.closed(), batch_invariant(predictor.base_model):
        expected = decoder(input_ids=text, use_cache=False).last_hidden_state[:, 7:]
    torch.testing.assert_close(again, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
