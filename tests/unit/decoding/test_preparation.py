"""What decoding changes in a network is undone, however it ends."""

from typing import Any

import pytest
import torch

from ptp_lightning.decoding import (
    DECODERS,
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.models.layers import packed_linear
from ptp_lightning.models.network import PredictorNetwork
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT
from tests.helpers.tiny_predictors import STUDENTS, tiny_predictor

SETTINGS = GenerationSettings(max_new_tokens=8, window_length=4)
LARGE = {"hidden_size": 256, "vocab_size": 512}  # wide enough for layers that are packed


def described(network: PredictorNetwork) -> dict[str, Any]:
    """All that a module may be changed in: its class, its mode, what it has instead of its class, and attention."""
    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if key != "training"}
        found[name] = type(module), module.training, attributes
    attention = {model.config._attn_implementation for model in (network.base_model, network.student_model)}
    weights = {name: (value.data_ptr(), value.clone()) for name, value in network.state_dict().items()}
    return {"modules": found, "attention": attention, "weights": weights, "gate": network.gate.state}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after["modules"] == before["modules"]
    assert after["attention"] == before["attention"] and after["gate"] == before["gate"]
    assert after["weights"].keys() == before["weights"].keys()
    for (address, value), (old_address, old_value) in zip(
        after["weights"].values(), before["weights"].values(), strict=True
    ):
        assert address == old_address and torch.equal(value, old_value)


@one_in(3, decoder=DECODERS, student=STUDENTS, dtype=[torch.float32, torch.bfloat16])
def test_nothing_is_left(decoder: str, student: str, dtype: torch.dtype) -> None:
    network = tiny_predictor(student=student, dtype=dtype, **LARGE).train()
    before = described(network)
    DECODERS[decoder](network, [PROMPT, [3]], SETTINGS)
    assert_same(before, described(network))


@pytest.mark.parametrize(
    "decode", [decode_autoregressively, decode_speculatively, decode_partially_quadratically], ids=lambda d: d.__name__
)
def test_nothing_is_left_after_an_interruption(decode: Any) -> None:
    network = tiny_predictor(**LARGE).train()
    before = described(network)

    def interrupt(row: int, token_ids: list[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(network, [PROMPT], SETTINGS, interrupt)
    assert_same(before, described(network))


def test_inside_the_block() -> None:
    """Eval mode, and packed layers: those of the base model with the adapter around them, and its head."""
    network = tiny_predictor(**LARGE).train()
    assert any(module.training for module in network.modules())
    with prepare_for_decoding(network):
        packed = {name for name, module in network.named_modules() if "forward" in vars(module)}
        assert not any(module.training for module in network.modules())
        with prepare_for_decoding(network):
            pass
        assert packed == {name for name, module in network.named_modules() if "forward" in vars(module)}
    assert any(name.endswith("mlp.down_proj.base_layer") for name in packed)
    assert any(name.endswith("lm_head") for name in packed)


def test_weights_are_packed_for_the_first_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_predictor(**LARGE)
    packed: list[Any] = []
    build = packed_linear.PackedLinear
    monkeypatch.setattr(packed_linear, "PackedLinear", lambda *args: packed.append(args) or build(*args))
    decode_speculatively(network, [PROMPT], SETTINGS)
    num_packed = len(packed)
    assert num_packed > 0
    for decode in DECODERS.values():
        decode(network, [PROMPT], SETTINGS)
    assert len(packed) == num_packed
