"""Operations that benchmarks count as required, compared with torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain_step

LENGTH = 8


@pytest.mark.parametrize("model", ["small", "135m"])
def test_a_plain_step(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of linear layers, including grouped keys; torch does not count attention on a CPU."""
    monkeypatch.setitem(plain_step.MODELS, model, plain_step.MODELS[model] | {"num_hidden_layers": 2})
    step = plain_step.make_step(model, 32, 2, LENGTH)
    with FlopCounterMode(display=False) as counter:
        step(0)
    counted = counter.get_flop_counts()["Global"]
    products = sum(
        flops for operation, flops in counted.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    linear_operations, _ = plain_step.operations_of_step(model, 32, 2, LENGTH)
    assert products == linear_operations
