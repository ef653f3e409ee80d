"""PackedDataModule: what every data module of packed batches has, its loaders and its place in the training stream."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packing import MIN_PIECE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedDataModule(LightningDataModule, ABC):
    """A data module whose training stream is endless, and goes on where a loaded checkpoint stopped.

    Attributes:
        row_length: S, tokens per row.
        tokenizer: what turned text into the ids; None where the data were never text, or before `setup`.
    """

    row_length: int
    tokenizer: "PreTrainedTokenizerBase | None" = None

    def __init__(self) -> None:
        super().__init__()
        # What the loaded checkpoint had consumed, and the trainer's step it was written at.
        self._loaded_batches = 0
        self._loaded_step = 0

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are smaller than this; known after `setup`."""

    @property
    @abstractmethod
    def end_of_text(self) -> int | None:
        """The id that ends a text, if there is one; known after `setup`."""

    @abstractmethod
    def training_stream(self) -> IterableDataset[PackedBatch]:
        """Endless batches of this rank, from number `batches_consumed` on."""

    @abstractmethod
    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """This rank's batches of the validation or test split, the same on every call."""

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Endless batches; the stream goes on where a loaded checkpoint stopped."""
        return DataLoader(self.training_stream(), batch_size=None)

    def val_dataloader(self) -> DataLoader[PackedBatch]:
        """The validation rows, the same on every call; on all processes equally many batches."""
        return self._fixed_loader("val")

    def test_dataloader(self) -> DataLoader[PackedBatch]:
        """The test rows; otherwise like `val_dataloader`."""
        return self._fixed_loader("test")

    def _fixed_loader(self, split: Split) -> DataLoader[PackedBatch]:
        batches = self.fixed_batches(split)
        # Processes that share a model's weights can only run it together.
        dataset: Any = batches[: fewest_of_all_processes(len(batches))]  # a map-style one, which the stubs do not know
        # Lightning would share them out among the processes once more, if they had another sampler.
        return DataLoader(dataset, batch_size=None, sampler=DistributedSampler(dataset, 1, 0, shuffle=False))

    def state_dict(self) -> dict[str, Any]:
        """How far the training stream was consumed; batches that were only prefetched do not count."""
        step = self._loaded_step if self.trainer is None else self.trainer.global_step
        return {"batches_consumed": self.batches_consumed(), "global_step": step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rewind the training stream to where the checkpoint was written."""
        self._loaded_batches = int(state_dict["batches_consumed"])
        self._loaded_step = int(state_dict["global_step"])

    def batches_consumed(self) -> int:
        """Batches of this rank that went into optimiser steps, over all runs that led here."""
        if self.trainer is None:
            return self._loaded_batches
        steps = self.trainer.global_step - self._loaded_step
        return self._loaded_batches + steps * self.trainer.accumulate_grad_batches

    def rank_and_world(self) -> tuple[int, int]:
        """This process among how many; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def fewest_of_all_processes(count: int) -> int:
    """The smallest of the counts that all processes have; asked by all of them together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, count)
    return min(counts)


def require_at_least(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check `{key: (value, smallest)}`.

    Raises:
        ValueError: a value is too small; names `data.{key}`.
    """
    for name, (value, minimum) in sizes.items():
        if value < minimum:
            raise ValueError(f"expected data.{name} >= {minimum}, found {value}")


def require_sizes(row_length: int, batch_size: int, num_windows: int, eval_rows: int) -> None:
    """Check what every data module of packed batches is told; raises as `require_at_least`."""
    require_at_least(
        {
            "row_length": (row_length, MIN_PIECE),
            "batch_size": (batch_size, 1),
            "num_windows": (num_windows, 1),
            "eval_rows": (eval_rows, 1),
        }
    )
