"""`--device`: what a user may name, and what is refused."""

import pytest
import torch

from ptp_lightning.decoding.devices import select_device


@pytest.mark.parametrize(("there_is_one", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_where_there_is_one(
    there_is_one: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    assert select_device("auto") == torch.device(expected)
    assert select_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:1", "found none: use --device cpu"),
        ("gpu", "found 'gpu'"),
        ("meta", "expected --device auto, cpu or cuda, found 'meta'"),
        ("xpu", "expected --device auto, cpu or cuda, found 'xpu'"),
        ("mps", "expected a device of Apple silicon for --device mps, found none"),
    ],
)
def test_devices_that_are_not_there_are_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        select_device(name)
