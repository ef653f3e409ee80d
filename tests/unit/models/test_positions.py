"""The positions of base models whose RoPE depends on the largest position of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ptp_lightning import PackedBatch
from ptp_lightning.decoding import Generation, generate
from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.positions import max_positions
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_families import build_family, family_config

LIMIT = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LONG},
    "phi3": {"model_type": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": LIMIT},
    "dynamic": {"model_type": "llama", "rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT},
}
DECODERS = ["autoregressive", "speculative", "speculative_lookup", "lookup", "partial_quadratic"]


def fields_of(name: str) -> dict[str, Any]:
    fields = FIELDS[name]
    return family_config(fields["model_type"]) | {"max_position_embeddings": 4096} | fields


@pytest.fixture(scope="module", params=FIELDS)
def network(request: pytest.FixtureRequest) -> PredictorNetwork:
    config = PredictorConfig(lora=LoraSettings(rank=2), window_length=8)
    network = PredictorNetwork(config, build_family(fields_of(request.param)))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(1))


def greedy(network: PredictorNetwork, ids: torch.Tensor, decoder: Any, num_new: int) -> Generation:
    return generate(
        network,
        ids[0].tolist(),
        max_new_tokens=num_new,
        sampling=SamplingConfig(temperature=0.0),
        decoder=decoder,
        end_of_text=(),
        tokenizer=byte_tokenizer(),
    )


@pytest.mark.parametrize("name", FIELDS)
def test_the_limit_is_known_from_the_configuration(name: str) -> None:
    assert max_positions(AutoConfig.for_model(**fields_of(name))) == LIMIT


def test_types_of_layers_with_a_rope_of_their_own() -> None:
    rope = {"full_attention": LONG, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config = AutoConfig.for_model(**family_config("gemma3_text"))
    config.rope_parameters = rope
    assert max_positions(config) == LIMIT


@pytest.mark.parametrize("decoder", DECODERS)
def test_texts_up_to_the_limit_are_those_of_generate(network: PredictorNetwork, decoder: str) -> None:
    """Slots and drafts reach beyond the limit at the end of a text."""
    model: Any = network.base_model
    ids = prompt(20)
    expected = model.generate(ids, do_sample=False, max_new_tokens=LIMIT - 20, eos_token_id=None, pad_token_id=0)
    assert greedy(network, ids, decoder, LIMIT - 20).token_ids == expected[0, 20:].tolist()


def test_longer_texts_are_refused(network: PredictorNetwork) -> None:
    with pytest.raises(ValueError, match=rf"prompt \+ max_new_tokens <= {LIMIT} tokens \(the base model's positions\)"):
        greedy(network, prompt(20), "speculative", LIMIT - 19)


@torch.no_grad()
def test_documents_of_packed_rows_are_those_alone(network: PredictorNetwork) -> None:
    """The longest documents that a row of this model may have leave those beside them alone."""
    lengths = [12, LIMIT - 8]
    documents = torch.repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    row = prompt(sum(lengths))
    batch = PackedBatch(row, documents, positions, torch.tensor([[sum(lengths) - 1]]), torch.ones_like(row).bool())
    context = network.encode(batch)
    network.slot_hidden(context, torch.rand(1, 1, 8, dtype=torch.float64))
    model: Any = network.base_model
    alone = torch.cat([model(input_ids=ids).logits[0] for ids in row.split(lengths, dim=1)])
    torch.testing.assert_close(network.logits(context.hidden)[0], alone, atol=1e-4, rtol=1e-4)


def test_the_limit_is_said_when_a_model_is_loaded() -> None:
    message = rf"texts of llama have at most {LIMIT} positions, .* type longrope .* predictor\.backbone\.path"
    with pytest.warns(UserWarning, match=message):
        PredictorNetwork(PredictorConfig(lora=LoraSettings(rank=2)), build_family(fields_of("llama")))
