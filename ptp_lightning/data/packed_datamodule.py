"""PackedDataModule: base class of the data modules of packed batches; data loaders and resumption."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packing import MIN_PIECE_TOKENS
from ptp_lightning.data.shard_spec import ShardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedDataModule(LightningDataModule, ABC):
    """A data module with an endless training stream, which a checkpoint can resume.

    Attributes:
        row_length: S, tokens per row.
        tokenizer: None before `setup`, and for data that are not text.
    """

    row_length: int
    tokenizer: "PreTrainedTokenizerBase | None" = None

    def __init__(self) -> None:
        super().__init__()
        # From the loaded checkpoint: batches consumed, and the trainer's global step.
        self._loaded_batches = 0
        self._loaded_step = 0

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: token ids are 0 .. V - 1; known after `setup`."""

    @property
    @abstractmethod
    def end_of_text(self) -> int | None:
        """The end-of-text token id, if there is one; known after `setup`."""

    @abstractmethod
    def training_stream(self) -> IterableDataset[PackedBatch]:
        """Endless batches of this rank, starting with batch number `batches_consumed`."""

    @abstractmethod
    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """This rank's batches of the validation or test split, the same on every call."""

    def training_texts(self) -> Iterator[Sequence[int]]:
        """Token ids of training texts for counts, without prompts; the same on every call and every rank.

        Raises:
            ValueError: the data are not text.
        """
        raise ValueError(
            f"expected text beside predictor.draft_vocabulary and predictor.ngrams, found {type(self).__name__}: set "
            "both to null"
        )

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Endless batches, resumed where a loaded checkpoint was written."""
        return DataLoader(self.training_stream(), batch_size=None)

    def val_dataloader(self) -> DataLoader[PackedBatch]:
        """The validation batches, the same on every call and the same number on every rank."""
        return self._fixed_loader("val")

    def test_dataloader(self) -> DataLoader[PackedBatch]:
        """The test batches; otherwise as `val_dataloader`."""
        return self._fixed_loader("test")

    def _fixed_loader(self, split: Split) -> DataLoader[PackedBatch]:
        batches = self.fixed_batches(split)
        # Ranks that share a sharded model must run it equally often.
        dataset: Any = batches[: min_across_ranks(len(batches))]  # a map-style dataset, which the type stubs reject
        # With any other sampler, Lightning would shard the batches a second time.
        return DataLoader(dataset, batch_size=None, sampler=DistributedSampler(dataset, 1, 0, shuffle=False))

    def state_dict(self) -> dict[str, Any]:
        """Number of batches consumed by optimizer steps; prefetched batches are not counted."""
        step = self._loaded_step if self.trainer is None else self.trainer.global_step
        return {"batches_consumed": self.batches_consumed(), "global_step": step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the training stream where the checkpoint was written."""
        self._loaded_batches = int(state_dict["batches_consumed"])
        self._loaded_step = int(state_dict["global_step"])

    def batches_consumed(self) -> int:
        """Batches of this rank consumed by optimizer steps, earlier runs included."""
        if self.trainer is None:
            return self._loaded_batches
        steps = self.trainer.global_step - self._loaded_step
        return self._loaded_batches + steps * self.trainer.accumulate_grad_batches

    def shard_spec(self) -> ShardSpec:
        """The shard of this process; all data without a trainer."""
        return ShardSpec() if self.trainer is None else ShardSpec(self.trainer.global_rank, self.trainer.world_size)


def min_across_ranks(count: int) -> int:
    """The smallest count of all ranks; a collective operation, to be called by all of them.

    >>> min_across_ranks(3)
    3
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, count)
    return min(counts)


def require_at_least(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check `{key: (value, minimum)}`.

    Raises:
        ValueError: a value is too small; names `data.{key}`.
    """
    for name, (value, minimum) in sizes.items():
        if value < minimum:
            raise ValueError(f"expected data.{name} >= {minimum}, found {value}")


def require_sizes(row_length: int, batch_size: int, num_windows: int, eval_rows: int) -> None:
    """Check the sizes common to all data modules of packed batches.

    Raises:
        ValueError: a value is too small, or there are more windows than tokens at which they could start: they would
            be repeated.
    """
    require_at_least(
        {
            "row_length": (row_length, MIN_PIECE_TOKENS),
            "batch_size": (batch_size, 1),
            "num_windows": (num_windows, 1),
            "eval_rows": (eval_rows, 1),
        }
    )
    if num_windows > row_length:
        raise ValueError(
            f"expected data.num_windows <= data.row_length, found {num_windows} and {row_length}: "
            "lower data.num_windows or raise data.row_length"
        )
