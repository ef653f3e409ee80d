"""TrainingModule: the base class of all LightningModules, for one device or many."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import LossSum
from ptp_lightning.models.layers.decoder_layers import decoder_layers
from ptp_lightning.training.alignment import align_logged_step, align_with_step
from ptp_lightning.training.distributed.sharding import shard
from ptp_lightning.training.optimization import OptimizerSettings, decay_start, require_same_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; all processes of a training raise it in the same step."""


class MicroBatch(NamedTuple):
    """One batch of an optimiser step, with its losses.

    Attributes:
        batch: of this rank.
        totals: `[losses]`, this rank's losses.
        mean_totals: `[losses]`, means of the losses over ranks.
        mean_count: `[]`, mean over ranks of the count of the first loss, by which a step is normalised.
    """

    batch: PackedBatch
    totals: Tensor
    mean_totals: Tensor
    mean_count: Tensor


class TrainingModule(LightningModule, ABC):
    """A module in training; its steps differ between processes only in the data.

    Args:
        optimizer: optimiser and schedule.
    """

    def __init__(self, optimizer: OptimizerSettings) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self._micro_batches: list[MicroBatch] = []

    @property
    @abstractmethod
    def networks(self) -> list[PreTrainedModel]:
        """The causal LMs that a step runs."""

    def shared_steps(self, total_steps: int) -> int:
        """Number of first steps that a training of this length has in common with every longer one.

        A checkpoint that is written after them continues each of these trainings.
        """
        return int(decay_start(self.optimizer_settings, total_steps))

    def configure_model(self) -> None:
        """Shard the weights over processes if the strategy does so."""
        if self.device_mesh is not None:
            shard(self, self.decoder_layers("set trainer.strategy to ddp"), self.device_mesh["data_parallel"])

    def decoder_layers(self, instead: str) -> list[nn.Module]:
        """Decoder layers of all networks; raises as `layers.decoder_layers`, with advice on what to do `instead`."""
        return decoder_layers(self.networks, instead)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another optimiser; raises as `require_same_optimizer`."""
        require_same_optimizer(self.optimizer_settings, checkpoint)

    def on_train_start(self) -> None:
        """Begin with a whole optimiser step, also where an earlier run was interrupted within one."""
        self._micro_batches = []
        align_with_step(self.trainer)

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Let loggers count optimiser steps, see `align_logged_step`."""
        align_logged_step(self.trainer)

    def on_validation_start(self) -> None:
        """As `on_train_batch_start`, for validations of a training."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            align_logged_step(self.trainer, validates=True)

    @property
    def micro_batch(self) -> int:
        """Index of the present batch among all batches of the training, for random numbers.

        It follows from the optimiser step, because Lightning's `batch_idx` is not the same after an interruption.
        """
        return self.global_step * self.trainer.accumulate_grad_batches + len(self._micro_batches)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before losses or gradients that are not finite reach the weights, so that checkpoints stay usable.

        Raises:
            NotFiniteError: on all processes; names the file that holds the batch.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        self._normalise(micro_batches)
        norm = torch.zeros(())
        # In float16 gradients overflow occasionally, and the scaler skips such steps.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.log("train/gradient_norm", norm)  # before clipping; read when it is logged
        totals = torch.stack([norm, *(entry.mean_totals.sum().to(norm) for entry in micro_batches)])
        if not totals.isfinite().all():  # one check for both, because it synchronises with the device
            self._raise_not_finite(micro_batches, float(norm))

    def _mean_counts(self, batch: PackedBatch, *losses: LossSum) -> Tensor:
        """The mean over ranks of each loss's count; 1 for a mean of 0.

        DDP averages gradients over ranks, so a local sum divided by the mean count gives the mean over all ranks. The
        totals are reduced as well, so that all ranks detect a loss that is not finite in the same step.
        """
        totals = torch.stack([loss.total.detach() for loss in losses])
        counts = torch.stack([loss.count for loss in losses]).to(totals.dtype)
        means = self.trainer.strategy.reduce(torch.stack([totals, counts]), reduce_op="mean")
        self._micro_batches.append(MicroBatch(batch, totals, means[0], means[1, 0]))
        return _divisor(means[1])

    def _share_of_step(self) -> Tensor:
        """By what a micro-batch multiplies its mean loss, so that all slots of a step have the same weight.

        It is the count of this micro-batch over that of the first one of the step: 1 without accumulation.
        `_normalise` replaces the latter by the mean over all, which is known when the step is complete.
        """
        first, latest = (_divisor(self._micro_batches[k].mean_count) for k in (0, -1))
        return latest / first

    def _normalise(self, micro_batches: list[MicroBatch]) -> None:
        """Divide the gradients of several micro-batches by the count of all of them, see `_share_of_step`."""
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated == 1 or not micro_batches:
            return
        counts = torch.stack([entry.mean_count for entry in micro_batches])
        # Lightning has divided each loss by `accumulated`, also where an epoch ends with fewer micro-batches.
        scale = accumulated * _divisor(counts[0]) / _divisor(counts.sum())
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def _raise_not_finite(self, micro_batches: list[MicroBatch], norm: float) -> NoReturn:
        """Store the suspect batches of this rank and raise."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # a collective call
        losses = torch.stack([entry.totals for entry in micro_batches]).cpu()
        losses_are_finite = bool(torch.stack([entry.mean_totals for entry in micro_batches]).isfinite().all())
        is_suspect = [losses_are_finite or not of_batch.isfinite().all() for of_batch in losses]
        location = "another process has the batch"
        if any(is_suspect):
            file = folder / f"not_finite_step_{self.global_step}_rank_{self.global_rank}.pt"
            folder.mkdir(parents=True, exist_ok=True)
            suspects = [entry for entry, suspect in zip(micro_batches, is_suspect, strict=True) if suspect]
            batches = [entry.batch.to("cpu")._asdict() for entry in suspects]
            torch.save({"global_step": self.global_step, "rank": self.global_rank, "batches": batches}, file)
            location = f"the batch is in {os.path.relpath(file)}"
        raise NotFiniteError(
            f"expected finite losses and gradients at step {self.global_step}, found losses "
            f"{losses.flatten().tolist()} on rank {self.global_rank} and gradients of norm {norm}: {location}; lower "
            "optimizer.learning_rate, set trainer.gradient_clip_val, or try trainer.precision: 32-true"
        )


def _divisor(count: Tensor) -> Tensor:
    """A count to divide by: 1 in place of 0, where the sum is 0 too."""
    return torch.where(count > 0, count, 1.0)
