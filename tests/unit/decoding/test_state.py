"""The context of a batch: a drafting call leaves the base model's own hidden states and the cache as they are."""

import pytest
import torch

from ptp_lightning.decoding.batch_invariance import batch_invariant
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.state import BatchContext
from tests.helpers.tiny_predictors import tiny_predictor

INPUT_IDS = torch.tensor([[5, 9, 7, 3, 8, 2, 6]])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_context_tokens_of_a_drafting_call_keep_their_bits(dtype: torch.dtype, family: str) -> None:
    """Slots stand in the same call with the gate open, and are refined; the tokens before them must not notice."""
    predictor = tiny_predictor(family, dtype=dtype)
    settings = GenerationSettings(predictor.config.sampling)
    contexts = [BatchContext(predictor, settings, [7]) for _ in range(2)]
    lookahead = Lookahead.single([7], 3, contexts[0].device)
    with prepare_for_decoding(predictor):
        hidden, slot_hidden = contexts[0].read(INPUT_IDS, lookahead)
        alone, _ = contexts[1].read(INPUT_IDS)
        without_adapter = tiny_predictor(family, dtype=dtype)
        for name, parameter in without_adapter.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        with prepare_for_decoding(without_adapter):
            base, base_slots = BatchContext(without_adapter, settings, [7]).read(INPUT_IDS, lookahead)
        assert torch.equal(hidden, alone) and torch.equal(hidden, base)
        assert not torch.equal(slot_hidden, base_slots)
        decoder = predictor.base_model.get_submodule(predictor.base_model.base_model_prefix)
        with predictor.gate.closed(), batch_invariant(predictor.base_model):
            expected = decoder(input_ids=INPUT_IDS, use_cache=False).last_hidden_state
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=tolerance)

        (context, _) = contexts
        context.keep([7])
        refined = context.correct(slot_hidden, INPUT_IDS[:, :3])
        assert refined.dtype == dtype and not torch.equal(refined, slot_hidden)
        assert context.num_calls == 1
        again, _ = context.read(INPUT_IDS[:, :2])
        text = torch.cat([INPUT_IDS, INPUT_IDS[:, :2]], dim=1)
        with predictor.gate.closed(), batch_invariant(predictor.base_model):
            expected = decoder(input_ids=text, use_cache=False).last_hidden_state[:, 7:]
        torch.testing.assert_close(again, expected, atol=5e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
