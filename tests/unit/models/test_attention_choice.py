"""Which attention back-end is chosen for which device and dtype, and that the log says so once."""

import logging

import pytest
import torch

from ptp_lightning.models.attention.blocks import Blocks
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.models.attention.flex import Flex
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.float32, Blocks),
        (CPU, torch.bfloat16, Blocks),
        (CUDA, torch.float32, Blocks),
        (CUDA, torch.bfloat16, Flex),
        (CUDA, torch.float16, Flex),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", TINY_MODELS)
def test_flex_is_for_16_bits_on_a_gpu(family: str, device: torch.device, dtype: torch.dtype, expected: type) -> None:
    choice = AttentionChoice(TINY_MODELS[family](hidden_size=64))
    assert type(choice.choose(device, dtype)) is expected


@pytest.mark.parametrize(("hidden_size", "more"), [(32, {}), (32, {"head_dim": 16}), (64, {"head_dim": 8})], ids=str)
def test_flex_is_not_for_small_heads(hidden_size: int, more: dict[str, int]) -> None:
    """The model's, or those of a refiner of its width."""
    choice = AttentionChoice(tiny_llama(hidden_size=hidden_size, **more))
    assert type(choice.choose(CUDA, torch.bfloat16)) is Blocks


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_model_with_an_attention_function_of_its_own_is_dense(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(hidden_size=64)
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert type(AttentionChoice(model).choose(device, torch.bfloat16)) is Dense


def test_autocast_counts_as_float32(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), torch.autocast("cpu", torch.bfloat16):
        AttentionChoice(tiny_llama(hidden_size=64)).choose(CPU, torch.bfloat16)
    assert caplog.messages == ["Windows attend by blocks on cpu in torch.float32"]


def test_a_single_candidate_is_always_chosen() -> None:
    dense = Dense()
    assert AttentionChoice(tiny_llama(), [dense]).choose(CUDA, torch.bfloat16) is dense


def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choice = AttentionChoice(tiny_llama(hidden_size=64))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            choice.choose(CPU, torch.float32)
            choice.choose(CUDA, torch.bfloat16)
    assert caplog.messages == [
        "Windows attend by blocks on cpu in torch.float32",
        "Windows attend by FlexAttention on cuda in torch.bfloat16",
    ]
