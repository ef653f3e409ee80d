"""The gate refuses what it does not understand, and closes in any case."""

import pytest

from ptp_lightning.models.lora.gate import Gate
from tests.helpers.tiny_gated_lora import SLOT_MASK


def test_gate_refuses_malformed_arguments() -> None:
    gate = Gate()
    for arguments, message in [
        ({"mask": SLOT_MASK, "suffix": 1}, "both"),
        ({"mask": SLOT_MASK.long()}, "bool"),
        ({"mask": SLOT_MASK[0]}, r"\[B, T\]"),
        ({"suffix": -1}, "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message), gate.open(**arguments):
            pass
    assert gate.state is None


def test_gate_closes_after_an_error() -> None:
    gate = Gate()
    with pytest.raises(KeyError), gate.open():
        raise KeyError
    assert gate.state is None
