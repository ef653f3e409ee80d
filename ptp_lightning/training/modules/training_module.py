"""TrainingModule: what every LightningModule does alike that is trained, on one device or on many."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import LossSum
from ptp_lightning.models.layers.decoder_stack import decoder_layers
from ptp_lightning.training.distributed.sharding import shard
from ptp_lightning.training.optimization import OptimizerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotFiniteError(ValueError):
    """A loss or a gradient is a NaN or infinite; raised by all processes of a training in the same step."""


class SeenBatch(NamedTuple):
    """A batch of the optimiser's next step.

    Attributes:
        batch: of this rank.
        totals: `[losses]`, this rank's losses.
        mean_totals: `[losses]`, their means over ranks.
    """

    batch: PackedBatch
    totals: Tensor
    mean_totals: Tensor


class TrainingModule(LightningModule, ABC):
    """A module in training, whose steps are the same on every process but for the data.

    Args:
        optimizer: optimiser and schedule.
    """

    def __init__(self, optimizer: OptimizerSettings) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self._seen: list[SeenBatch] = []

    @property
    @abstractmethod
    def networks(self) -> list[PreTrainedModel]:
        """The causal LMs that a step runs, layer by layer."""

    def configure_model(self) -> None:
        """Share the weights out among processes where the strategy does so."""
        if self.device_mesh is not None:
            shard(self, self.decoder_layers("set trainer.strategy to ddp"), self.device_mesh["data_parallel"])

    def decoder_layers(self, instead: str) -> list[nn.Module]:
        """Of all networks; raises as `decoder_stack`, with what to do `instead` where they are not found."""
        return decoder_layers(self.networks, instead)

    def on_train_start(self) -> None:
        """Forget what an earlier run left in the middle of a step."""
        self._seen = []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse losses and gradients that would spoil the weights, so that a checkpoint can still be gone on from.

        Raises:
            NotFiniteError: on all processes alike; says in which file the batch is.
        """
        seen, self._seen = self._seen, []
        norm = torch.zeros(())
        # With float16 gradients overflow now and then, and the scaler leaves such steps out.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        totals = torch.stack([norm, *(entry.mean_totals.sum().to(norm) for entry in seen)])
        if not totals.isfinite().all():  # one look for both: it waits for the device
            self._refuse(seen, float(norm))

    def _mean_counts(self, batch: PackedBatch, *losses: LossSum) -> Tensor:
        """Means over ranks of what sums are divided by, one a loss; 1 for a mean of 0.

        DDP averages gradients over ranks, so a local sum over a mean count gives the mean over all of them. The totals
        go along, so that all ranks know in the same step when one of them is broken.
        """
        totals = torch.stack([loss.total.detach() for loss in losses])
        counts = torch.stack([loss.count for loss in losses]).to(totals.dtype)
        means = self.trainer.strategy.reduce(torch.stack([totals, counts]), reduce_op="mean")
        self._seen.append(SeenBatch(batch, totals, means[0]))
        return torch.where(means[1] > 0, means[1], 1.0)

    def _refuse(self, seen: list[SeenBatch], norm: float) -> NoReturn:
        """Write the batches of this rank that may be to blame."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # all ranks ask for it together
        losses = torch.stack([entry.totals for entry in seen]).cpu()
        broken_anywhere = not torch.stack([entry.mean_totals for entry in seen]).isfinite().all()
        blamed = [not broken_anywhere or not of_batch.isfinite().all() for of_batch in losses]
        place = "another process has its batch"
        if any(blamed):
            file = folder / f"not_finite_step_{self.global_step}_rank_{self.global_rank}.pt"
            folder.mkdir(parents=True, exist_ok=True)
            batches = [
                entry.batch.to("cpu")._asdict() for entry, is_blamed in zip(seen, blamed, strict=True) if is_blamed
            ]
            torch.save({"global_step": self.global_step, "rank": self.global_rank, "batches": batches}, file)
            place = f"the batch is in {os.path.relpath(file)}"
        raise NotFiniteError(
            f"expected finite losses and gradients at step {self.global_step}, found losses "
            f"{losses.flatten().tolist()} on rank {self.global_rank} and gradients of norm {norm}: {place}; lower "
            "optimizer.learning_rate, set trainer.gradient_clip_val, or try trainer.precision: 32-true"
        )
