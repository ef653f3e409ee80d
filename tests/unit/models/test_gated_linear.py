"""GatedLoraLinear without gradients: products and sums in place give the values that autograd records."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.tiny_gated_lora import INPUT_IDS, SLOT_MASK, SLOTS, gated, logits
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("state", ["suffix", "mask", "everywhere"])
def test_values_are_the_same_with_and_without_gradients(state: str, family: str, num_rows: int) -> None:
    model, gate = gated(TINY_MODELS[family]())
    rows = INPUT_IDS[:num_rows]
    arguments = {"suffix": {"suffix": SLOTS}, "mask": {"mask": SLOT_MASK[:num_rows]}, "everywhere": {}}[state]
    with gate.open(**arguments):
        expected = model(rows).logits
        assert expected.requires_grad
        torch.testing.assert_close(logits(model, rows), expected)
        with torch.no_grad(), model.disable_adapter():
            disabled = model(rows).logits
    assert torch.equal(disabled, logits(model, rows))


def test_dropout_of_a_training_adapter_acts_without_gradients_too() -> None:
    model, gate = gated(tiny_llama(), dropout=0.5)
    model.train()
    with torch.no_grad(), gate.open(suffix=SLOTS):
        assert not torch.equal(model(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_adapter_that_is_added_later_is_gated() -> None:
    model, gate = gated(tiny_llama())
    before = logits(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert torch.equal(logits(model), before)
    with gate.open():
        assert not torch.equal(logits(model), before)
