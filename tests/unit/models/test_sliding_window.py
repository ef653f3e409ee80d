"""Sliding windows: which tokens a query sees, in packed rows, windows and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ptp_lightning.decoding import generate
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.attention.masks import context_mask, slot_mask
from ptp_lightning.models.attention.sliding_window import has_sliding_window, layer_masks, within_window
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_models import tiny_family

MIXED = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": MIXED},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "phi3": {"sliding_window": 6},
    "olmo3": {"sliding_window": 6, "layer_types": MIXED},
    "starcoder2": {"sliding_window": 6},
    "exaone4": {"sliding_window": 6, "layer_types": MIXED},
}


def test_two_documents_in_a_row() -> None:
    mask = within_window(context_mask(torch.tensor([[0, 0, 0, 0, 1, 1, 1]])), 2)[0, 0].int()
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_slots_see_less_of_the_context_the_further_they_are_from_it() -> None:
    """A window starts after the third of four tokens; its three slots are positions 3, 4 and 5."""
    offsets, window = torch.arange(3), torch.zeros(3, dtype=torch.long)
    full = slot_mask(
        torch.zeros(1, 4, dtype=torch.long),
        torch.tensor([[3]]),
        query_window=window,
        query_offset=offsets,
        key_window=window,
        key_offset=offsets,
    )
    assert within_window(full, 3)[0, 0].int().tolist() == [
        [0, 1, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]


def test_masks_of_the_layers() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    plain, same, mixed = (
        AutoConfig.for_model(kind, **options)
        for kind, options in (
            ("llama", {}),
            ("mistral", {"sliding_window": 2}),
            ("qwen2", {"sliding_window": 2, "use_sliding_window": True, "layer_types": MIXED, "num_hidden_layers": 2}),
        )
    )
    assert [has_sliding_window(config) for config in (plain, same, mixed)] == [False, True, True]
    assert layer_masks(plain, mask) is mask
    windowed = layer_masks(same, mask)
    assert isinstance(windowed, torch.Tensor) and windowed[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    by_type = layer_masks(mixed, mask)
    assert isinstance(by_type, dict) and by_type["full_attention"] is mask
    assert torch.equal(by_type["sliding_attention"], windowed)


@pytest.fixture(scope="module", params=FAMILIES.items(), ids=FAMILIES.keys())
def network(request: pytest.FixtureRequest) -> PredictorNetwork:
    kind, options = request.param
    model = tiny_family(kind, **({"head_dim": 16, "pad_token_id": 0} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    config = PredictorConfig(BackboneSettings(path="unused"), lora=LoraSettings(rank=2), window_length=4)
    network = PredictorNetwork(config, model)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_the_window_matters_to_this_model(network: PredictorNetwork) -> None:
    """A token out of all windows changes the last logits if layers do not have them."""
    model: Any = network.base_model
    ids = torch.arange(1, 31).unsqueeze(0)
    windowed = model(input_ids=ids).logits[0, -1]
    model.config.sliding_window, before = 100, model.config.sliding_window
    unlimited = model(input_ids=ids).logits[0, -1]
    model.config.sliding_window = before
    assert not torch.allclose(windowed, unlimited, atol=1e-3)


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative", "speculative_lookup", "partial_quadratic"])
def test_greedy_text_is_that_of_generate(network: PredictorNetwork, decoder: Any) -> None:
    prompt = torch.randint(1, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    model: Any = network.base_model
    expected = model.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)[0, 20:]
    found = generate(
        network,
        prompt[0].tolist(),
        max_new_tokens=24,
        sampling=SamplingConfig(temperature=0.0),
        decoder=decoder,
        end_of_text=(),
        tokenizer=byte_tokenizer(),
    )
    assert found.token_ids == expected.tolist()
