"""Norms and rotary attention with fewer intermediates compute what the modules of transformers compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb

from ptp_lightning.models import LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.attention.dispatch import use_window_attention
from ptp_lightning.models.layers import row_parts
from ptp_lightning.models.layers.memory_efficient import make_lean, rms_norm, rotated
from ptp_lightning.models.layers.mixed_in import MixedIn
from tests.helpers.tiny_models import TINY_MODELS, cast_weights, tiny_llama
from tests.helpers.tiny_predictors import STUDENTS
from tests.helpers.tiny_shared_students import make_batch

LENGTH = 5


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.4


def angles(num_rows: int = 1) -> tuple[Tensor, Tensor]:
    """Of 3 places, heads of 4."""
    half = uniform(num_rows, 3, 2)
    return torch.cat([half, half], dim=-1).cos(), torch.cat([half, half], dim=-1).sin()


class TestRmsNorm:
    def test_written_out(self) -> None:
        x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        normed = rms_norm(x, torch.tensor([1.0, 10.0]), 0.5)  # mean squares 12.5 and 0.5
        root = 13**0.5
        torch.testing.assert_close(normed, torch.tensor([[3 / root, 40 / root], [0.0, 10.0]]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_in_several_parts_and_numbers_of_16_bits(self, dtype: torch.dtype) -> None:
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


class TestRotated:
    def test_a_quarter_turn(self) -> None:
        """Of one head: (1, 2 | 3, 4) becomes (-3, -4 | 1, 2)."""
        x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        result = rotated(x, torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
        assert result.tolist() == [[[-3, -4, 1, 2]]]
        assert result.data_ptr() == x.data_ptr()

    @pytest.mark.parametrize("part_rows", [1, 3, 6], ids=["less than a row at once", "a row", "both rows"])
    @pytest.mark.parametrize("num_rows", [1, 2], ids=["one table", "a table a row"])
    def test_it_is_that_of_transformers(self, num_rows: int, part_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(row_parts, "PART_ROWS", part_rows)
        x, tables = uniform(2, 3, 8), angles(num_rows)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        expected, _ = apply_rotary_pos_emb(heads, heads, *tables)
        found = rotated(x.clone(), *tables).unflatten(-1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(found, expected)

    def test_gradients(self) -> None:
        x = uniform(2, 3, 8).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rotated(x * 1, *angles()), x)


def lean(model: nn.Module) -> Counter[str]:
    """Modules that have been changed, by kind."""
    return Counter(type(module).__bases__[0].__name__ for module in model.modules() if isinstance(module, MixedIn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"_LeanNorm": 5, "_LeanAttention": 2}),
        ("qwen2", {"_LeanNorm": 5, "_LeanAttention": 2}),
        ("qwen3", {"_LeanNorm": 9}),  # its attention normalises queries and keys
        ("gpt2", {}),
        ("gpt_neox", {}),
    ],
)
def test_families(family: str, expected: dict[str, int], dtype: torch.dtype) -> None:
    model = cast_weights(TINY_MODELS[family](), dtype)
    use_window_attention(model)
    make_lean(model)
    assert lean(model) == expected


class ShiftedNorm(LlamaRMSNorm):
    """As that of Gemma."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


class SharpAttention(LlamaAttention):
    """Of the same parts, with something more."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(2 * hidden_states, **kwargs)


def test_modules_of_other_arithmetic_stay_as_they_are() -> None:
    model = tiny_llama()
    use_window_attention(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = SharpAttention
        layer.input_layernorm.__class__ = ShiftedNorm
        layer.post_attention_layernorm.__class__ = ShiftedNorm
    model.model.norm.__class__ = ShiftedNorm
    make_lean(model)
    assert not lean(model)


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
    monkeypatch.setattr("ptp_lightning.models.network.make_lean", lambda _: None)
    for name, plain in results(family, student, torch.float64).items():  # whose norms compute in float32
        assert (found[name] - plain).norm() < 1e-5 * plain.norm(), name


def test_states_and_gradients_are_the_same_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation is in float32 there, so that nothing may be written in place."""
    found = results("llama", "gated_lora", torch.float32)
    monkeypatch.setattr("ptp_lightning.models.network.make_lean", lambda _: None)
    for name, plain in results("llama", "gated_lora", torch.float32).items():
        assert (found[name] - plain).norm() < 0.02 * plain.norm(), name


@pytest.mark.parametrize("family", TINY_MODELS)
def test_where_nothing_is_trained_models_are_their_own(family: str) -> None:
    """Bit for bit."""
    plain, model = TINY_MODELS[family](), TINY_MODELS[family]()
    use_window_attention(model)
    make_lean(model)
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)  # base weights want gradients here
