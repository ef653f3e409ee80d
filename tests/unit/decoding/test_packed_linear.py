"""Packed linear layers say what plain ones say, whatever happens to their weights."""

import copy
import io

import pytest
import torch
from torch import nn

from ptp_lightning.decoding import packed_linear
from ptp_lightning.decoding.packed_linear import SMALLEST_SIZE, pack_linear_layers

WIDTH = 256
assert WIDTH * 2 * WIDTH == SMALLEST_SIZE


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
    pack_linear_layers(layer)
    return layer


def plain(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(rows, layer.weight, layer.bias)


def is_packed(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 17), (7,), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    layer, rows = linear(bias), torch.randn(*shape, WIDTH)
    assert is_packed(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(rows), plain(layer, rows), rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_contiguous() -> None:
    layer, rows = linear(), torch.randn(2, WIDTH, 5).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), plain(layer, rows), rtol=1e-5, atol=1e-5)


def test_one_token_takes_the_plain_way_bit_for_bit() -> None:
    layer, token = linear(), torch.randn(1, 1, WIDTH)
    with torch.no_grad():
        assert torch.equal(layer(token), plain(layer, token))


def test_several_tokens_take_the_packed_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        layer(rows)
        monkeypatch.setattr(nn.functional, "linear", None)
        layer(rows)


@pytest.mark.parametrize("how", ["in place", "loaded", "replaced"])
def test_it_follows_when_weights_change(how: str) -> None:
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


def test_another_number_format_takes_the_plain_way() -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        layer(rows)
        layer.bfloat16()
        assert torch.equal(layer(rows.bfloat16()), plain(layer, rows.bfloat16()))


def test_gradients_are_those_of_the_plain_layer() -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    layer(rows).square().sum().backward()
    found = layer.weight.grad
    expected = torch.autograd.grad(plain(layer, rows).square().sum(), layer.weight)[0]
    assert found is not None and torch.equal(found, expected)


def test_weights_without_a_version_take_the_plain_way() -> None:
    with torch.inference_mode():
        layer, rows = linear(), torch.randn(4, WIDTH)
        layer(rows)
        layer.weight.mul_(2)
        assert torch.equal(layer(rows), plain(layer, rows))


def test_copies_have_weights_of_their_own() -> None:
    layer, rows = linear(), torch.randn(4, WIDTH)
    with torch.no_grad():
        before = layer(rows)
        copied = copy.deepcopy(layer)
        copied.weight.mul_(2)
        torch.testing.assert_close(copied(rows), plain(copied, rows), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(rows), before)


def test_a_whole_module_can_be_saved() -> None:
    layer, rows, file = linear(), torch.randn(4, WIDTH), io.BytesIO()
    with torch.no_grad():
        before = layer(rows)
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(rows), before)


def test_small_layers_and_large_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Linear(WIDTH, 2 * WIDTH - 1)
    pack_linear_layers(small)
    assert not is_packed(small)
    monkeypatch.setattr(packed_linear, "LARGEST_BYTES", 4 * SMALLEST_SIZE)
    allowed, large = nn.Linear(WIDTH, 2 * WIDTH), nn.Sequential(*[nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2)])
    pack_linear_layers(allowed)
    pack_linear_layers(large)
    assert is_packed(allowed)
    assert not any(is_packed(layer) for layer in large)


def test_packing_again_changes_nothing() -> None:
    layer = linear()
    forward = layer.forward
    pack_linear_layers(layer)
    assert layer.forward is forward
