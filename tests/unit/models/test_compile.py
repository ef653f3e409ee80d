"""Compiled decoder layers compute the same, share what is compiled, and leave alone what reads without gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.layers.activation_checkpointing import checkpoint_layers
from ptp_lightning.models.layers.compile import compile_layers
from ptp_lightning.models.layers.decoder_layers import decoder_layers
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_predictors import STUDENTS
from tests.helpers.tiny_shared_students import make_batch

LENGTH = 5
GRAPHS_OF_A_LAYER = 4
"""Norm, products before attention, product after it, norm and products of the rest."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Nothing that another test has compiled."""
    torch._dynamo.reset()


def make_predictor(family: str = "llama", student: str = "gated_lora", **settings: Any) -> PredictorNetwork:
    """Trained a little, without dropout; in float64, whose rounding is no excuse."""
    torch.manual_seed(1)
    config = PredictorConfig(lora=LoraSettings(rank=4), window_length=LENGTH, student=STUDENTS[student])
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=30, **settings))
    for parameter in predictor.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return predictor.double().eval()


def layers_of(predictor: PredictorNetwork) -> list[torch.nn.Module]:
    twin = predictor.student_copy
    return decoder_layers([predictor.base_model] if twin is None else [predictor.base_model, twin], "")


def slot_states(predictor: PredictorNetwork) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    auxiliaries = torch.rand(*make_batch().window_starts.shape, LENGTH, dtype=torch.float64, generator=generator)
    return predictor.slot_hidden(predictor.encode(make_batch()), auxiliaries)


def results(predictor: PredictorNetwork) -> dict[str, Tensor]:
    """States of slots, and gradients by everything that is trained."""
    predictor.zero_grad()
    hidden = slot_states(predictor)
    weights = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(3))
    (hidden * weights).sum().backward()  # not their norms, which are the same for all
    gradients = {name: value.grad for name, value in predictor.named_parameters() if value.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


def assert_same(found: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """By norms: those of the layers are in float32 even in float64."""
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm(), name


@pytest.mark.parametrize(
    ("family", "student"),
    [
        ("llama", "gated_lora"),
        ("llama", "full_copy"),
        ("gpt2", "gated_lora"),
        # Slow: layers of the same structure as one of those above.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "shared"),
                *((name, "gated_lora") for name in TINY_MODELS if name not in ("llama", "gpt2")),
            )
        ),
    ],
)
def test_states_and_gradients_are_the_same(family: str, student: str) -> None:
    predictor = make_predictor(family, student)
    plain = results(predictor)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(layers_of(predictor), counter)
    compiled = results(predictor)
    assert counter.frame_count
    assert_same(compiled, plain)


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    """What `compile: true` uses, and what needs a C++ compiler."""
    predictor = make_predictor()
    plain = results(predictor)
    compile_layers(layers_of(predictor))
    assert_same(results(predictor), plain)


def test_layers_share_what_is_compiled() -> None:
    """Nine layers, more than torch compiles one function for, and a second step: still the graphs of one layer."""
    predictor = make_predictor(num_hidden_layers=9)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(layers_of(predictor), counter)
    results(predictor)
    results(predictor)
    assert counter.frame_count == GRAPHS_OF_A_LAYER


def test_what_is_compiled_for_one_layer_has_no_other_layers_weights() -> None:
    predictor = make_predictor()
    plain = results(predictor)
    layers = layers_of(predictor)
    compile_layers(layers, "aot_eager")
    results(predictor)
    for parameter in layers[-1].parameters():
        parameter.data.mul_(1.5)
    changed = results(predictor)["hidden"]
    for parameter in layers[-1].parameters():
        parameter.data.div_(1.5)
    assert (changed - plain["hidden"]).abs().max() > 1e-2
    assert_same(results(predictor), plain)


def test_nothing_is_compiled_without_gradients() -> None:
    predictor = make_predictor()
    counter = CompileCounterWithBackend("aot_eager")
    expected = slot_states(predictor)
    compile_layers(layers_of(predictor), counter)
    with torch.no_grad():
        torch.testing.assert_close(slot_states(predictor), expected, rtol=0, atol=0)
    assert counter.frame_count == 0


def test_layers_may_be_computed_again() -> None:
    predictor = make_predictor()
    plain = results(predictor)
    compile_layers(layers_of(predictor), "aot_eager")
    checkpoint_layers(layers_of(predictor), predictor.gate)
    assert_same(results(predictor), plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_gated_layers_have_a_gate_of_their_own(duplicate: Any) -> None:
    predictor = make_predictor()
    expected = slot_states(predictor)
    twin = duplicate(predictor)
    torch.testing.assert_close(slot_states(twin), expected, rtol=0, atol=0)
    assert twin.gate is not predictor.gate
    gates = [module.gate for module in twin.modules() if isinstance(module, GatedLoraLinear)]
    assert gates and all(gate is twin.gate for gate in gates)
