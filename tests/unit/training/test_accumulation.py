"""Accumulated micro-batches give the step of one large batch, also where their numbers of learned slots differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ptp_lightning.auxiliary_strategies import RelativeStrategy
from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.students import SharedStudent
from ptp_lightning.training.modules.autoregressive import AutoregressiveModule
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.modules.inverse_autoregressive import InverseAutoregressiveModule
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.windows.dataset_windows import DatasetWindows

LENGTH = 16
STARTS = torch.tensor([[13, 14, 15], [2, 6, 10], [8, 8, 9], [1, 5, 14]])
LEARNED_FROM = (14, 2, 9, 1)  # in rows of 16 tokens: 2, 14, 7 and 15 tokens
MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


class Middle(RelativeStrategy):
    """No random numbers, so that the same rows give the same windows in any batch."""

    def relative(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.full(tuple(shape), 0.5, dtype=torch.float64, device=device)


def batch(rows: Sequence[int]) -> PackedBatch:
    ids = torch.randint(1, 32, (4, LENGTH), generator=torch.Generator().manual_seed(5))
    learned = torch.stack([torch.arange(LENGTH) >= start for start in LEARNED_FROM])
    positions = torch.arange(LENGTH).expand(4, -1)
    parts = (ids, torch.zeros_like(ids), positions, STARTS, learned)
    return PackedBatch(*(part[list(rows)] for part in parts))


class Batches(PackedDataModule):
    row_length = LENGTH
    vocab_size = 32
    end_of_text = None

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups = groups

    def training_stream(self) -> IterableDataset[PackedBatch]:
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        return DataLoader([batch(group) for group in self.groups], batch_size=None)  # pyright: ignore[reportArgumentType]

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        return []


def distillation(**options: Any) -> DistillationModule:
    config = PredictorConfig(BackboneSettings(from_config=MODEL), lora=LoraSettings(rank=2), window_length=4)
    return DistillationModule(config, source=DatasetWindows(strategy=Middle()), **options)


def teacher_free(**options: Any) -> InverseAutoregressiveModule:
    config = PredictorConfig(BackboneSettings(from_config=MODEL), window_length=4, student=SharedStudent())
    return InverseAutoregressiveModule(config, strategy=Middle(), autoregressive_loss_weight=0.0, **options)


def pretraining(**options: Any) -> AutoregressiveModule:
    return AutoregressiveModule(BackboneSettings(from_config=MODEL), **options)


def update(make: Any, groups: Sequence[Sequence[int]], accumulate: int) -> Tensor:
    """What one step of gradient descent adds to the weights."""
    torch.manual_seed(0)
    module = make(optimizer=OptimizerSettings())
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = torch.cat([weight.detach().flatten().clone() for weight in weights])
    module.configure_optimizers = lambda: torch.optim.SGD(weights, lr=1.0)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=Batches(groups))
    assert trainer.global_step == 1
    return torch.cat([weight.detach().flatten() for weight in weights]) - before


@pytest.mark.parametrize("make", [distillation, teacher_free, pretraining])
@pytest.mark.parametrize(
    ("groups", "accumulate"),
    [([[0], [1], [2], [3]], 4), ([[0, 1, 2], [3]], 2), ([[1], [0, 3], [2]], 4)],
    ids=["single rows", "unequal batches", "the end of an epoch"],
)
def test_a_step_does_not_depend_on_how_rows_are_divided(
    make: Any, groups: Sequence[Sequence[int]], accumulate: int
) -> None:
    expected = update(make, [[0, 1, 2, 3]], 1)
    found = update(make, groups, accumulate)
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-4 * expected.norm()
