"""Rows that are sharded over processes, and auxiliary variables that depend on the rows alone, for tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ptp_lightning.auxiliary_strategies import RelativeStrategy
from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.data.shard_spec import ShardSpec

VOCAB_SIZE, ROWS, ROW_LENGTH = 32, 4, 12
# Of the first document in each of four rows: the rows of the second half have fewer tokens that count.
LENGTHS = torch.tensor([11, 9, 5, 4])


def rows(number: int) -> PackedBatch:
    """Four rows of a document and padding after it, with two windows each."""
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.randint(VOCAB_SIZE, (ROWS, ROW_LENGTH), generator=generator)
    position = torch.arange(ROW_LENGTH).expand(ROWS, -1)
    inside = position < LENGTHS.unsqueeze(-1)
    starts = torch.tensor([[1, 3]] * ROWS)
    return PackedBatch(input_ids, torch.where(inside, 0, -1), position.where(inside, 0), starts, inside)


def shard(batch: PackedBatch, spec: ShardSpec) -> PackedBatch:
    return PackedBatch(*(tensor.chunk(spec.world_size)[spec.rank].contiguous() for tensor in batch))


class SharedStream(IterableDataset[PackedBatch]):
    def __init__(self, data: SharedRows) -> None:
        self.data = data

    def __iter__(self) -> Iterator[PackedBatch]:
        for number in itertools.count(self.data.batches_consumed()):
            yield shard(rows(number), self.data.shard_spec())


class SharedRows(PackedDataModule):
    """The same rows in every step, however many processes there are."""

    row_length = ROW_LENGTH

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def end_of_text(self) -> int | None:
        return None

    def training_texts(self) -> Iterator[list[int]]:
        return (row for number in range(4) for row in rows(number).input_ids.tolist())

    def training_stream(self) -> IterableDataset[PackedBatch]:
        return SharedStream(self)

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        spec = self.shard_spec()
        return [shard(rows(1000 + number), spec) for number in range(2 + spec.rank)]


@dataclass(frozen=True)
class Centres(RelativeStrategy):
    """The centre of each interval, whatever the generator."""

    def relative(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.full(tuple(shape), 0.5, dtype=torch.float64, device=device)
