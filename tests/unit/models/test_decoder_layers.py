"""The decoder layers of a causal LM are found, or it is said what to set."""

from typing import Any

import pytest
import torch

from ptp_lightning.models.layers.decoder_layers import decoder_layers
from tests.helpers.tiny_models import TINY_MODELS


def test_layers_of_several_models() -> None:
    models = [TINY_MODELS[family]() for family in ("llama", "gpt2")]
    found = [type(layer).__name__ for layer in decoder_layers(models, "set something")]
    assert found == ["LlamaDecoderLayer"] * 2 + ["GPT2Block"] * 2


def test_layers_that_are_not_found() -> None:
    """Two lists of the same length: which are the layers?"""
    model = TINY_MODELS["llama"]()
    decoder: Any = model.get_decoder()
    decoder.others = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(ValueError, match="one list of 2 layers in LlamaModel, found 2: set something"):
        decoder_layers([model], "set something")
