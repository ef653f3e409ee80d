"""Packed linear layers compute what plain ones do, whatever happens to their weights, and leave no trace."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import nn

from ptp_lightning.models.layers import packed_linear
from ptp_lightning.models.layers.packed_linear import MAX_PRODUCT_ROWS, PackedLinear, PackedWeights

WIDTH = 256


Make = Callable[..., nn.Linear]


@pytest.fixture
def linear() -> Iterator[Make]:
    """Makes layers that use packed weights until the end of the test."""
    with ExitStack() as stack:

        def make(bias: bool = True) -> nn.Linear:
            torch.manual_seed(0)
            layer = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
            stack.enter_context(PackedWeights().in_use(layer))
            return layer

        yield make


def plain(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(rows, layer.weight, layer.bias)


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each product that is packed."""
    packed: list[Any] = []
    build = packed_linear.PackedLinear
    monkeypatch.setattr(packed_linear, "PackedLinear", lambda *args: packed.append(args) or build(*args))
    return packed


def is_packed(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


def is_copy(packed: PackedLinear, layer: nn.Linear) -> bool:
    return packed.weight.is_mkldnn or packed.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 17), (7,), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_those_of_the_plain_layer(linear: Make, shape: tuple[int, ...], bias: bool) -> None:
    layer, rows = linear(bias), torch.randn(*shape, WIDTH)
    assert is_packed(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(rows), plain(layer, rows), rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_contiguous(linear: Make) -> None:
    layer, rows = linear(), torch.randn(2, WIDTH, 5).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), plain(layer, rows), rtol=1e-5, atol=1e-5)


def test_one_token_takes_the_way_of_several_bit_for_bit(linear: Make) -> None:
    layer, tokens = linear(), torch.randn(1, 2, WIDTH)
    with torch.no_grad():
        assert torch.equal(layer(tokens[:, :1]), layer(tokens)[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"),
    [(576, 960), (1536, 576), (2048, 2560), (5632, 2048), (36, 50), (144, 432), (384, 144), (576, 455), (577, 7)],
)
@torch.no_grad()
def test_rows_do_not_depend_on_each_other(num_inputs: int, num_outputs: int, pack: bool, dtype: torch.dtype) -> None:
    """Bit for bit, for 1 to 64 rows and 200, wherever they begin."""
    torch.manual_seed(0)
    layer = nn.Linear(num_inputs, num_outputs).to(dtype)
    rows, packed = torch.randn(200, num_inputs).to(dtype), PackedLinear([layer], pack)
    one_by_one = torch.cat([packed(row) for row in rows.split(1)])
    assert torch.equal(packed(rows), one_by_one)
    begin = 0
    for size in (*range(1, 18), 20, 24, 31, 32, 33, 48, 63, 64):
        assert torch.equal(packed(rows[begin : begin + size]), one_by_one[begin : begin + size])
        begin = (begin + size) % (len(rows) - 64)
    assert len(rows) > MAX_PRODUCT_ROWS
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(one_by_one, plain(layer, rows), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_small_weights_are_transposed_only_where_rows_add_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows = nn.Linear(64, 32), torch.randn(5, 64)
    large, rounded = nn.Linear(1024, 1024), nn.Linear(64, 32, dtype=torch.bfloat16)
    assert [PackedLinear([one]).weight.is_mkldnn for one in (layer, large, rounded)] == [False, True, True]
    monkeypatch.setattr(packed_linear, "_adds_alike", lambda *shape: False)
    packed = PackedLinear([layer])
    assert packed.weight.is_mkldnn
    torch.testing.assert_close(packed(rows), plain(layer, rows), rtol=1e-5, atol=1e-5)


def test_a_product_whose_rows_depend_on_their_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with threads that share its inputs."""
    packed_linear._adds_alike.cache_clear()
    product = torch.Tensor.__matmul__

    def added_in_halves(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(rows[:, :20], weight[:20]) + product(rows[:, 20:], weight[20:])

    assert packed_linear._adds_alike(24, 40, 1)
    packed_linear._adds_alike.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (added_in_halves if len(a) > 16 else product)(a, b))
    assert not packed_linear._adds_alike(24, 40, 1)
    packed_linear._adds_alike.cache_clear()


@torch.no_grad()
def test_layers_are_joined() -> None:
    layers = [nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 7, bias=False), nn.Linear(WIDTH, 3)]
    rows, packed_weights = torch.randn(4, WIDTH), PackedWeights()
    expected = torch.cat([layer(rows) for layer in layers], dim=1)
    joined = packed_weights.linear(*layers)
    torch.testing.assert_close(joined(rows), expected, rtol=1e-5, atol=1e-5)
    assert packed_weights.linear(*layers) is joined is not packed_weights.linear(layers[0])
    layers[1].weight.mul_(2)
    expected = torch.cat([layer(rows) for layer in layers], dim=1)
    torch.testing.assert_close(packed_weights.linear(*layers)(rows), expected, rtol=1e-5, atol=1e-5)


def test_several_tokens_take_the_packed_way(linear: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        layer(rows)
        monkeypatch.setattr(nn.functional, "linear", None)
        layer(rows)


@pytest.mark.parametrize("how", ["in place", "loaded", "replaced"])
def test_it_follows_when_weights_change(linear: Make, how: str) -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        before = layer(rows)
        if how == "in place":
            layer.weight.mul_(2)
        elif how == "loaded":
            layer.load_state_dict({"weight": 2 * layer.weight, "bias": layer.bias})
        else:
            layer.weight = nn.Parameter(2 * layer.weight)
        after = layer(rows)
        torch.testing.assert_close(after, plain(layer, rows), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, after, rtol=1e-2)


def test_it_follows_when_the_dtype_changes(linear: Make) -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        layer(rows)
        layer.bfloat16()
        torch.testing.assert_close(layer(rows.bfloat16()), plain(layer, rows.bfloat16()), rtol=2e-2, atol=2e-2)
        layer.double()
        assert torch.equal(layer(rows.double()), plain(layer, rows.double()))


def test_gradients_are_those_of_the_plain_layer(linear: Make) -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    layer(rows).square().sum().backward()
    found = layer.weight.grad
    expected = torch.autograd.grad(plain(layer, rows).square().sum(), layer.weight)[0]
    assert found is not None and torch.equal(found, expected)


def test_weights_without_a_version_are_not_packed(linear: Make) -> None:
    with torch.inference_mode():
        layer, rows = linear(), torch.randn(4, WIDTH)
        layer(rows)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(rows), plain(layer, rows), rtol=1e-5, atol=1e-5)
        assert not is_copy(PackedWeights().linear(layer), layer)


def test_copies_have_weights_of_their_own(linear: Make) -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        before = layer(rows)
        copied = copy.deepcopy(layer)
        copied.weight.mul_(2)
        torch.testing.assert_close(copied(rows), plain(copied, rows), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(rows), before)


def test_a_whole_module_can_be_saved(linear: Make) -> None:
    layer, rows, file = linear(), torch.randn(4, WIDTH), io.BytesIO()
    with torch.no_grad():
        before = layer(rows)
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(rows), before)


def test_large_models_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_weights, rows = PackedWeights(), torch.randn(4, WIDTH)
    size = nn.Linear(WIDTH, 2 * WIDTH).weight.nbytes
    monkeypatch.setattr(packed_linear, "MAX_TOTAL_BYTES", size)
    allowed, large = nn.Linear(WIDTH, 2 * WIDTH), nn.Sequential(*[nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2)])
    with torch.no_grad(), packed_weights.in_use(allowed), packed_weights.in_use(large):
        for model, is_allowed in ((allowed, True), (large[0], False)):
            torch.testing.assert_close(model(rows), plain(model, rows), rtol=1e-5, atol=1e-5)
            ((_, (copy, *_)),) = packed_weights._by_layer[model].items()
            assert is_copy(copy, model) == is_allowed


def test_an_inner_block_changes_nothing() -> None:
    layer, packed_weights = nn.Linear(WIDTH, 2 * WIDTH), PackedWeights()
    with packed_weights.in_use(layer):
        forward = layer.forward
        with packed_weights.in_use(layer):
            assert layer.forward is forward
        assert layer.forward is forward


@pytest.mark.parametrize("interrupted", [True, False])
def test_nothing_is_left_on_the_layer(interrupted: bool) -> None:
    layer = nn.Linear(WIDTH, 2 * WIDTH)
    before = set(vars(layer))
    with suppress(KeyboardInterrupt), PackedWeights().in_use(layer):
        assert is_packed(layer)
        if interrupted:
            raise KeyboardInterrupt
    assert set(vars(layer)) == before


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they are in use in one block after the other."""
    layer, rows, packed_weights = nn.Linear(WIDTH, 2 * WIDTH), torch.randn(4, WIDTH), PackedWeights()
    packed = count_packed(monkeypatch)
    for _ in range(3):
        with torch.no_grad(), packed_weights.in_use(layer):
            layer(rows)
    assert len(packed) == 1


def test_packed_weights_go_with_their_layer_and_stay_out_of_copies() -> None:
    layer, packed_weights = nn.Linear(WIDTH, 2 * WIDTH), PackedWeights()
    with torch.no_grad(), packed_weights.in_use(layer):
        layer(torch.randn(4, WIDTH))
    assert len(packed_weights._by_layer) == 1
    for copied in (copy.deepcopy(packed_weights), pickle.loads(pickle.dumps(packed_weights))):
        assert not copied._by_layer
    del layer
    gc.collect()
    assert not packed_weights._by_layer
