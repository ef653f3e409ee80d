"""The base model's first layers on their own: the model's own numbers, adapter or not, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ptp_lightning.models.correction.lower_layers import LowerLayers
from ptp_lightning.models.lora.gated_lora import LoraSettings, add_gated_lora
from tests.helpers.tiny_models import TINY_MODELS

NUM_LAYERS = 3
INPUT_IDS = torch.tensor([[5, 9, 2, 2, 7, 1], [3, 3, 8, 0, 4, 6]])
POSITION_IDS = torch.arange(6).expand(2, -1)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize("family", TINY_MODELS)
@torch.no_grad()
def test_they_are_the_models_own(family: str) -> None:
    """Token by token with a cache, and with an adapter whose gate stands open: what a whole pass says on the way."""
    model = TINY_MODELS[family](num_layers=NUM_LAYERS).double()
    whole = model(input_ids=INPUT_IDS, output_hidden_states=True)
    decoder = getattr(model, model.base_model_prefix)
    (norm,) = (part for name, part in decoder.named_children() if name in ("norm", "ln_f", "final_layer_norm"))
    embeddings = model.get_input_embeddings()(INPUT_IDS)
    peft_model, gate = add_gated_lora(model, LoraSettings(rank=2))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    parameters = {name for name, _ in peft_model.named_parameters()}
    for num_layers in (1, 2):
        lower_layers = LowerLayers(model, num_layers, gate)
        cache = DynamicCache()
        found = []
        with gate.open():
            for place in range(6):
                mask = CAUSAL[None, None, place : place + 1, : place + 1].expand(2, -1, -1, -1)
                at_place = slice(place, place + 1)
                found.append(lower_layers(embeddings[:, at_place], POSITION_IDS[:, at_place], mask, cache))
        assert torch.allclose(torch.cat(found, dim=1), norm(whole.hidden_states[num_layers]), atol=1e-9)
        assert len(cache.layers) == num_layers
    again = model(input_ids=INPUT_IDS, output_hidden_states=True)
    assert torch.equal(again.logits, whole.logits) and model.config.num_hidden_layers == NUM_LAYERS
    assert {name for name, _ in peft_model.named_parameters()} == parameters


def test_no_gradients() -> None:
    model = TINY_MODELS["llama"]()
    _, gate = add_gated_lora(model, LoraSettings(rank=2))
    embeddings = torch.zeros(1, 1, model.config.hidden_size, requires_grad=True)
    lower_layers = LowerLayers(model, 1, gate)
    states = lower_layers(embeddings, torch.tensor([[0]]), torch.ones(1, 1, 1, 1, dtype=torch.bool), DynamicCache())
    assert not states.requires_grad
