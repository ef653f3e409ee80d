"""Norms and rotary attention with fewer intermediates compute what the modules of transformers compute."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb

from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.attention.dispatch import register_attention, use_window_attention
from ptp_lightning.models.layers import row_parts
from ptp_lightning.models.layers.memory_efficient import use_memory_efficient_layers
from ptp_lightning.models.layers.rms_norm import SUPPORTED_NORMS, MemoryEfficientRMSNorm, rms_norm
from ptp_lightning.models.layers.rotary_attention import (
    SUPPORTED_ATTENTION,
    MemoryEfficientAttention,
    rotate_in_place,
)
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.tiny_predictors import STUDENTS
from tests.helpers.tiny_shared_students import make_batch

LENGTH = 5


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.4


def angles(num_rows: int = 1) -> tuple[Tensor, Tensor]:
    """Tables for 3 positions and heads of 4."""
    half = uniform(num_rows, 3, 2)
    return torch.cat([half, half], dim=-1).cos(), torch.cat([half, half], dim=-1).sin()


class TestRmsNorm:
    def test_written_out(self) -> None:
        x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        normed = rms_norm(x, torch.tensor([1.0, 10.0]), 0.5)  # mean squares 12.5 and 0.5
        root = 13**0.5
        torch.testing.assert_close(normed, torch.tensor([[3 / root, 40 / root], [0.0, 10.0]]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_several_parts_and_16_bits(self, dtype: torch.dtype) -> None:
        norm = LlamaRMSNorm(8).to(dtype)
        norm.weight.requires_grad_(False).copy_(uniform(8))
        x = uniform(2, row_parts.PART_ROWS, 8).to(dtype).requires_grad_()
        other = x.detach().clone().requires_grad_()
        expected, found = norm(x), rms_norm(other, norm.weight, norm.variance_epsilon)
        expected.backward(uniform(*x.shape).to(dtype))
        found.backward(uniform(*x.shape).to(dtype))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(other.grad, x.grad, rtol=tolerance, atol=tolerance)

    def test_heads_that_are_transposed_first(self) -> None:
        """As in EXAONE-4: tensors whose rows do not follow each other in memory."""
        norm = LlamaRMSNorm(8)
        norm.weight.requires_grad_(False).copy_(uniform(8))
        x = uniform(2, 5, 3, 8).float().requires_grad_()
        other = x.detach().clone().requires_grad_()
        expected = norm(x.transpose(1, 2))
        found = rms_norm(other.transpose(1, 2), norm.weight, norm.variance_epsilon)
        gradient = uniform(2, 5, 3, 8).float().transpose(1, 2)
        expected.backward(gradient)
        found.backward(gradient)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(other.grad, x.grad)


class TestRotation:
    def test_a_quarter_turn(self) -> None:
        """Of one head: (1, 2 | 3, 4) becomes (-3, -4 | 1, 2)."""
        x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        result = rotate_in_place(x, torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
        assert result.tolist() == [[[-3, -4, 1, 2]]]
        assert result.data_ptr() == x.data_ptr()

    @pytest.mark.parametrize("part_rows", [1, 3, 6], ids=["less than a row", "one row", "both rows"])
    @pytest.mark.parametrize("num_rows", [1, 2], ids=["one table", "a table for each row"])
    def test_equals_transformers(self, num_rows: int, part_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(row_parts, "PART_ROWS", part_rows)
        x, tables = uniform(2, 3, 8), angles(num_rows)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        expected, _ = apply_rotary_pos_emb(heads, heads, *tables)
        found = rotate_in_place(x.clone(), *tables).unflatten(-1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(found, expected)

    def test_gradients(self) -> None:
        x = uniform(2, 3, 8).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rotate_in_place(x * 1, *angles()), x)


def replaced(model: nn.Module) -> Counter[str]:
    """How many modules were replaced, by kind."""
    kinds = (MemoryEfficientRMSNorm, MemoryEfficientAttention)
    return Counter(type(module).__name__ for module in model.modules() if isinstance(module, kinds))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"MemoryEfficientRMSNorm": 5, "MemoryEfficientAttention": 2}),
        ("qwen2", {"MemoryEfficientRMSNorm": 5, "MemoryEfficientAttention": 2}),
        ("qwen3", {"MemoryEfficientRMSNorm": 9}),  # its attention normalises queries and keys
        ("gpt2", {}),
        ("gpt_neox", {}),
    ],
)
def test_families(family: str, expected: dict[str, int]) -> None:
    model = TINY_MODELS[family]()
    names = list(model.state_dict())
    use_memory_efficient_layers(model)
    assert replaced(model) == expected
    assert list(model.state_dict()) == names
    use_memory_efficient_layers(model)
    assert replaced(model) == expected


class ShiftedNorm(LlamaRMSNorm):
    """As that of Gemma."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


class SharpAttention(LlamaAttention):
    """Of the same parts, with something more."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(2 * hidden_states, **kwargs)


def test_subclasses_are_left_alone() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = SharpAttention
        layer.input_layernorm.__class__ = ShiftedNorm
        layer.post_attention_layernorm.__class__ = ShiftedNorm
    model.model.norm.__class__ = ShiftedNorm
    use_memory_efficient_layers(model)
    assert not replaced(model)


def library_class(name: str) -> Any:
    module_name, _, class_name = name.rpartition(".")
    return getattr(importlib.import_module(module_name), class_name)


@pytest.mark.parametrize("name", sorted(SUPPORTED_NORMS))
def test_supported_norms(name: str) -> None:
    norm = library_class(name)(8, eps=0.1).requires_grad_(False)
    norm.weight.copy_(uniform(8))
    assert set(norm.state_dict()) == {"weight"}
    x = uniform(2, 3, 8).float()
    torch.testing.assert_close(rms_norm(x, norm.weight, norm.variance_epsilon), norm(x))
    assert torch.equal(MemoryEfficientRMSNorm(norm)(x), norm(x))  # no gradient is wanted


class AddedUp:
    """Stands for the keys of windows: adds up queries, keys and values, so that each of them shows."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        others = (2 * key + 3 * value).repeat_interleave(shared, dim=1)
        return ((query + others) * scale).transpose(1, 2).contiguous()


@pytest.mark.parametrize("name", sorted(SUPPORTED_ATTENTION))
def test_supported_attention_layers(name: str) -> None:
    kind = library_class(name)
    configuration = importlib.import_module(kind.__module__.replace(".modeling_", ".configuration_"))
    config = getattr(configuration, kind.__name__.removesuffix("Attention") + "Config")(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_hidden_layers=1,
        attn_implementation=register_attention(),
    )
    attention = kind(config, layer_idx=0).double()
    assert set(attention._modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    arguments = {"position_embeddings": angles(), "attention_mask": mask, "window_keys": AddedUp()}
    x = uniform(2, 3, 16)
    expected, _ = attention(x, **arguments)
    efficient = MemoryEfficientAttention(attention)
    found, _ = efficient(x, **arguments)
    in_place = {
        "_RotationBackward",
        "torch::autograd::CopySlices",
    }  # the second if a projection returns a view, as with a bias
    assert in_place & names_of_graph(found) and not in_place & names_of_graph(expected)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(efficient(x, **arguments)[0], attention(x, **arguments)[0])


def names_of_graph(output: Tensor) -> set[str]:
    """Of all operations that autograd has recorded."""
    names, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes.extend(parent for parent, _ in node.next_functions)
    return names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate: Any) -> None:
    model = tiny_llama()
    use_memory_efficient_layers(model)
    twin = duplicate(model)
    assert replaced(twin) == replaced(model)
    assert twin.model.norm.weight is not model.model.norm.weight
    tokens = torch.arange(1, 9).view(1, 8)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)


def results(family: str, student: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """States of slots, and gradients by everything that is trained."""
    torch.manual_seed(1)
    config = PredictorConfig(lora=LoraSettings(rank=4), window_length=LENGTH, student=STUDENTS[student])
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=30)).to(dtype).eval()
    for parameter in predictor.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    auxiliaries = (uniform(*make_batch().window_starts.shape, LENGTH) + 0.4).clamp(0, 0.999)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        hidden = predictor.slot_hidden(predictor.encode(make_batch()), auxiliaries)
    (hidden * uniform(hidden.shape[-1])).sum().backward()
    gradients = {name: value.grad for name, value in predictor.named_parameters() if value.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_states_and_gradients_are_the_same(family: str, student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(family, student, torch.float64)
    monkeypatch.setattr("ptp_lightning.models.training_changes.use_memory_efficient_layers", lambda _: None)
    for name, plain in results(family, student, torch.float64).items():  # norms compute in float32
        assert (found[name] - plain).norm() < 1e-5 * plain.norm(), name


def test_states_and_gradients_are_the_same_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation is in float32 there, so nothing may be written in place."""
    found = results("llama", "gated_lora", torch.float32)
    monkeypatch.setattr("ptp_lightning.models.training_changes.use_memory_efficient_layers", lambda _: None)
    for name, plain in results("llama", "gated_lora", torch.float32).items():
        assert (found[name] - plain).norm() < 0.02 * plain.norm(), name


@pytest.mark.parametrize("family", TINY_MODELS)
def test_without_training_models_are_unchanged(family: str) -> None:
    """Bit for bit."""
    plain, model = TINY_MODELS[family](), TINY_MODELS[family]()
    use_window_attention(model)
    use_memory_efficient_layers(model)
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)  # base weights want gradients here
