"""Modules without memory run their own code; results that depend on values are as if nothing were masked."""

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from ptp_lightning.planning.fake_tensors import fake_execution, meta_modules
from ptp_lightning.sampling import allows_dynamic_shapes

TERABYTE = 10**12


class Tied(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, size, bias=False)
        self.second = nn.Linear(size, size, bias=False)
        self.second.weight = self.first.weight


def test_a_step_of_terabytes_leaves_gradients_and_no_memory() -> None:
    with meta_modules():
        module = Tied(500_000)
    assert module.first.weight.nbytes == TERABYTE
    with fake_execution(module, on_gpu=False):
        module.second(module.first(torch.ones(3, 500_000))).sum().backward()
    assert module.second.weight is module.first.weight
    assert module.first.weight.grad is not None
    assert module.first.weight.grad.shape == (500_000, 500_000)


def test_checks_pass_and_nothing_is_masked() -> None:
    with fake_execution(nn.Module(), on_gpu=False):
        rows, mask = torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)
        assert (rows == 1).all()
        assert not (rows == 0).any()
        assert torch.allclose(rows, rows + 1)
        assert mask.nonzero().shape == (4, 1)
        assert rows[mask].shape == (4, 3)
        assert rows[mask.view(2, 2).view(4, 1).expand(4, 3)].shape == (12,)
        assert rows.masked_select(mask.unsqueeze(1)).shape == (12,)
        rows[mask] = torch.ones(3)
        assert mask.long().bincount(minlength=7).shape == (7,)


def test_sums_of_metrics_are_replaced_too() -> None:
    with meta_modules():
        mean = MeanMetric()
    with fake_execution(mean, on_gpu=False):
        mean.update(torch.ones(3))
        assert mean.compute().device.type == "cpu"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_is_cuda_is_as_given(on_gpu: bool) -> None:
    with fake_execution(nn.Module(), on_gpu=on_gpu):
        assert torch.zeros(1).is_cuda is on_gpu
        assert allows_dynamic_shapes(torch.zeros(1)) is not on_gpu
