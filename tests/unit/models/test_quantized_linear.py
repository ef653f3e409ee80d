"""Products of 8 bits, and where they are used: for drafts in bfloat16 alone."""

import pytest
import torch
from torch import nn

from ptp_lightning.models.layers import quantized_linear
from ptp_lightning.models.layers.packed_linear import PackedLinear, PackedWeights
from ptp_lightning.models.layers.quantized_linear import DraftLinear, QuantizedLinear, is_quantizable

needs_operators = pytest.mark.skipif(not quantized_linear._is_available(), reason="needs the engine fbgemm of torch")


def draft_layer(num_inputs: int = 64, num_outputs: int = 48, bias: bool = False) -> DraftLinear:
    torch.manual_seed(0)
    return DraftLinear(num_inputs, num_outputs, bias=bias).to(torch.bfloat16)


@needs_operators
@pytest.mark.parametrize("num_rows", [1, 2, 7, 40])
def test_products_are_close(num_rows: int) -> None:
    layers = [draft_layer(576, 100, bias=True), draft_layer(576, 30)]
    rows = torch.randn(num_rows, 576, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = QuantizedLinear(layers)(rows)
        expected = torch.cat([layer.float()(rows.float()) for layer in layers], dim=1)
    assert found.dtype == torch.bfloat16 and found.shape == (num_rows, 130)
    # 127 steps of a weight and 127 of an input: about 0.01 of the result's spread.
    assert (found.float() - expected).std() < 0.03 * expected.std()


@needs_operators
def test_a_row_of_zeros() -> None:
    layer = draft_layer()
    with torch.no_grad():
        layer.weight[3] = 0
    assert QuantizedLinear([layer])(torch.ones(2, 64, dtype=torch.bfloat16))[:, 3].tolist() == [0, 0]


@needs_operators
def test_the_engine_of_others_stays() -> None:
    before = torch.backends.quantized.engine
    QuantizedLinear([draft_layer()])
    assert torch.backends.quantized.engine == before


@needs_operators
def test_only_drafts_are_rounded() -> None:
    plain = nn.Linear(64, 48, dtype=torch.bfloat16)
    weights = PackedWeights()
    assert isinstance(weights.linear(plain), PackedLinear)
    assert isinstance(weights.draft_linear(plain), QuantizedLinear)
    assert isinstance(weights.draft_linear(plain.float()), PackedLinear)
    model, rows = nn.Sequential(draft_layer(64, 64), nn.Linear(64, 64, dtype=torch.bfloat16)), torch.randn(3, 64)
    rows = rows.to(torch.bfloat16)
    with torch.inference_mode(), weights.in_use(model):
        assert torch.equal(model[0](rows), weights.draft_linear(model[0])(rows))
        assert torch.equal(model[1](rows), weights.linear(model[1])(rows))
    assert torch.equal(model[0](rows), nn.functional.linear(rows, model[0].weight))


@needs_operators
def test_a_copy_follows_its_weights() -> None:
    layer, weights, rows = draft_layer(), PackedWeights(), torch.ones(2, 64, dtype=torch.bfloat16)
    assert weights.draft_linear(layer) is weights.draft_linear(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert not weights.draft_linear(layer)(rows).any()


def test_without_the_operators_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_linear, "_is_available", lambda: False)
    assert not is_quantizable(draft_layer())
    assert isinstance(PackedWeights().draft_linear(draft_layer()), PackedLinear)
