"""Adapted layers go straight to their products while nothing is trained; the results are those of PEFT's way."""

import pytest
import torch
from peft import LoraConfig

from ptp_lightning.models.lora.gated_lora import attach_gate
from tests.helpers.tiny_gated_lora import INPUT_IDS, SLOTS, gated, logits
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_short_way_without_training_gives_the_same(family: str, num_rows: int) -> None:
    """Its products and sums are those of PEFT's layers; only the way to them is shorter."""
    model, gate = gated(TINY_MODELS[family]())
    called: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    rows = INPUT_IDS[:num_rows]
    with gate.open(suffix=SLOTS):
        long_way = model(rows).logits
        assert called
        called.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(rows).logits, long_way)
        assert not called
        with torch.no_grad(), model.disable_adapter():
            disabled = model(rows).logits
    with torch.no_grad():
        assert torch.equal(disabled, model(rows).logits)


def test_dropout_of_a_training_adapter_acts_without_gradients_too() -> None:
    model, gate = gated(tiny_llama(), dropout=0.5)
    model.train()
    with torch.no_grad(), gate.open(suffix=SLOTS):
        assert not torch.equal(model(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_an_adapter_that_is_not_behind_the_gate_acts_when_it_is_closed() -> None:
    """Until `attach_gate` covers it."""
    model, gate = gated(tiny_llama())
    before = logits(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.equal(logits(model), before)
    assert attach_gate(model) is gate
    assert torch.equal(logits(model), before)
