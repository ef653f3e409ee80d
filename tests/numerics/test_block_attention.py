"""Attention by blocks is dense attention under the mask of windows, in values, gradients and whole models."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptp_lightning.models import PredictorNetwork
from ptp_lightning.models.attention import block_attention as block_attention_module
from ptp_lightning.models.attention.block_attention import VisibleKeys, block_attention
from ptp_lightning.models.attention.blocks import BlockKeys, Blocks
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.models.attention.flex import FlexKeys
from ptp_lightning.models.attention.interface import WindowAttention
from ptp_lightning.models.students import FullCopyStudent, GatedLoraStudent, Student
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_windows import make_batch
from tests.numerics.test_window_attention import VOCAB_SIZE, inputs, make_predictor

ROWS, HEADS, WINDOWS, QUERIES, CONTEXT, OWN, SIZE, VALUE_SIZE = 2, 3, 4, 5, 7, 6, 8, 9


def random_arguments(dtype: torch.dtype) -> tuple[list[Tensor], VisibleKeys]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (ROWS, HEADS, WINDOWS, QUERIES, SIZE),
        (ROWS, HEADS, CONTEXT, SIZE),
        (ROWS, HEADS, CONTEXT, VALUE_SIZE),
        (ROWS, HEADS, WINDOWS, OWN, SIZE),
        (ROWS, HEADS, WINDOWS, OWN, VALUE_SIZE),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    sees_context = torch.rand(ROWS, WINDOWS, CONTEXT, generator=generator) < 0.5
    sees_context[0, :2, -3:] = sees_context[1, :, 0] = False  # groups see less than everything
    sees_own = torch.rand(QUERIES, OWN, generator=generator) < 0.5
    sees_own[:, 0] = True  # no query sees nothing
    return [tensor.requires_grad_() for tensor in tensors], VisibleKeys(sees_context, sees_own)


def by_blocks(tensors: list[Tensor], visible: VisibleKeys) -> Tensor:
    query, context_keys, context_values, own_keys, own_values = tensors
    return block_attention(query, (context_keys, context_values), (own_keys, own_values), visible, 0.3)


def window_by_window(tensors: list[Tensor], visible: VisibleKeys) -> Tensor:
    query, context_keys, context_values, own_keys, own_values = tensors
    seen_context = visible.context.unsqueeze(2).expand(-1, -1, QUERIES, -1)
    sees = torch.cat([seen_context, visible.own.expand(ROWS, WINDOWS, -1, -1)], dim=-1)
    windows = [
        scaled_dot_product_attention(
            query[:, :, n],
            torch.cat([context_keys, own_keys[:, :, n]], dim=2),
            torch.cat([context_values, own_values[:, :, n]], dim=2),
            attn_mask=sees[:, n].unsqueeze(1),
            scale=0.3,
        )
        for n in range(WINDOWS)
    ]
    return torch.stack(windows, dim=2)


@pytest.mark.parametrize("min_windows", [1, 2, 3, WINDOWS, ROWS * WINDOWS])
@pytest.mark.parametrize("frozen", [[], [1, 2], [0], [3], [4]], ids=str)
def test_values_and_gradients_are_those_of_dense_attention(
    frozen: list[int], min_windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups of any size, also where some inputs need no gradient, as the context's keys under gated LoRA."""
    monkeypatch.setattr(block_attention_module, "MAX_GROUP_SCORES_CPU", 1)
    monkeypatch.setattr(block_attention_module, "MIN_GROUP_WINDOWS", min_windows)
    tensors, visible = random_arguments(torch.float64)
    for index in frozen:
        tensors[index].requires_grad_(False)
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    found, expected = by_blocks(tensors, visible), window_by_window(tensors, visible)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for own, reference in zip(
        torch.autograd.grad(found, trained, upstream), torch.autograd.grad(expected, trained, upstream), strict=True
    ):
        torch.testing.assert_close(own, reference, atol=1e-12, rtol=0)


@pytest.mark.parametrize("heads", [3, 6])
def test_flex_attention_sees_the_same(heads: int) -> None:
    """Its values alone: on a CPU it has no gradients. With 6 query heads, two share the keys of one."""
    generator = torch.Generator().manual_seed(0)
    context_keys, context_values = (torch.randn(ROWS, 3, CONTEXT, SIZE, generator=generator) for _ in range(2))
    keys, values = (torch.randn(ROWS, 3, WINDOWS * 5, SIZE, generator=generator) for _ in range(2))
    query = torch.randn(ROWS, heads, WINDOWS * 5, SIZE, generator=generator)
    sees_context = torch.rand(ROWS, WINDOWS, CONTEXT, generator=generator) < 0.5
    sees_context[..., 0] = True
    context: Any = SimpleNamespace(layers=[SimpleNamespace(keys=context_keys, values=context_values)])
    expected = BlockKeys(context, sees_context).attend(0, query, keys, values, 0.3)
    found = FlexKeys(context, sees_context, 5).attend(0, query, keys, values, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    tensors, visible = random_arguments(torch.bfloat16)
    exact = window_by_window([tensor.double() for tensor in tensors], visible)
    found = by_blocks(tensors, visible)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize("family", TINY_MODELS)
class TestInAModel:
    """Grouped queries, learned positions, partly rotary ones; against the dense mask, which other models get."""

    @pytest.mark.parametrize("student", [GatedLoraStudent(), FullCopyStudent()], ids=lambda student: student.name)
    def test_slots(self, family: str, student: Student) -> None:
        blocks, dense = (self.make(family, attention, student) for attention in (Blocks(), Dense()))
        input_ids, auxiliaries = inputs()
        hidden = [
            predictor.slot_hidden(predictor.encode(make_batch(input_ids)), auxiliaries) for predictor in (blocks, dense)
        ]
        torch.testing.assert_close(*hidden, atol=1e-9, rtol=0)
        upstream = torch.randn(hidden[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for states in hidden:
            (states * upstream).sum().backward()
        for (name, own), other in zip(blocks.named_parameters(), dense.parameters(), strict=True):
            if own.requires_grad:
                torch.testing.assert_close(own.grad, other.grad, atol=1e-9, rtol=1e-9, msg=name)

    def test_positions_that_are_read_call_by_call(self, family: str) -> None:
        """One position, then two: as if all three had been read at once, with either back-end."""
        embeddings = torch.randn(2, 3, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = []
        for attention in (Blocks(), Dense()):
            predictor = self.make(family, attention)
            with torch.no_grad(), predictor.gate.closed():
                context = predictor.encode(make_batch(inputs()[0]))
                found.append(predictor.read_windows(context, embeddings))
                reader = predictor.incremental_reader(context)
                parts = [reader.read(part) for part in embeddings.split([1, 2], dim=2)]
                found.append(torch.cat(parts, dim=2))
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, atol=1e-9, rtol=0)

    @staticmethod
    def make(family: str, attention: WindowAttention, student: Student | None = None) -> PredictorNetwork:
        predictor = make_predictor.__wrapped__(family).double()
        if student is not None:
            torch.manual_seed(2)
            config = replace(predictor.config, student=student)
            predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=VOCAB_SIZE)).double().eval()
        assert isinstance(predictor.attention.choose(torch.device("cpu"), torch.float64), Blocks), "as all of these do"
        predictor.attention = AttentionChoice(predictor.base_model, [attention])
        return predictor
