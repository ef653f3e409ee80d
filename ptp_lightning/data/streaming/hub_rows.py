"""Rows of a Hugging Face dataset, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.row_source import Position, RawRow, RowSource
from ptp_lightning.utils.pretrained import clear_errors
from ptp_lightning.utils.randomness import keyed_generator

READ_BATCH_SIZE = 64  # rows between two saved positions of the library; a resumed run reads up to this many again


@dataclass(frozen=True)
class HubRows(RowSource):
    """A dataset that `datasets.load_dataset` streams: a hub id, or a file format such as `parquet` with files.

    The dataset's shards are read in a different order in each epoch. Processes divide the shards if their number is
    divisible, and the rows otherwise. The readers of `datasets` raise an error for a whole file when a row is invalid;
    `JsonLines` can skip single rows.

    Args:
        path: hub id or file format.
        name: configuration of the dataset.
        data_files: files, for a file format.
        split: of the dataset.
        revision: branch, tag or commit on the hub.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None

    def rows(self, key: str, shard: ShardSpec, position: Position | None = None) -> Iterator[RawRow]:
        """See `RowSource.rows`.

        Raises:
            FileNotFoundError: the dataset cannot be opened.
            ValueError: a file of the dataset cannot be read, or has other columns than the first.
        """
        from datasets.table import CastError

        dataset = self._open(key, shard)
        skipped = 0
        if position is not None:
            dataset.load_state_dict(position["dataset"])
            skipped = position["within"]
        state = dataset.state_dict()
        # Iteration by row would divide the rows among the workers of the data loader a second time.
        with clear_errors(f"{self.path} (data_files {self.data_files}, split {self.split})", "HubRows.path"):
            batches = dataset.iter(batch_size=READ_BATCH_SIZE)
            while True:
                try:
                    columns = next(batches, None)
                except CastError as error:
                    raise ValueError(self._other_columns(error.requested_column_names)) from error
                if columns is None:
                    return
                num_rows = len(next(iter(columns.values())))
                for within in range(skipped, num_rows):
                    row = {column: values[within] for column, values in columns.items()}
                    identity = json.dumps(row, sort_keys=True, default=str).encode()
                    position = {"dataset": state, "within": within + 1}
                    yield RawRow(row, f"{self.path}, split {self.split}", identity, position)
                state, skipped = dataset.state_dict(), 0

    def _other_columns(self, expected: list[str]) -> str:
        """Name a file with other columns, and one of these."""
        from datasets import load_dataset_builder

        files: list[str] = []
        if self.data_files is not None:  # of a file format; patterns become names
            config: Any = load_dataset_builder(self.path, data_files=self.data_files).config
            files = config.data_files[self.split]
        for file in files:
            rows = iter(load_stream(self.path, self.name, [file], self.split, self.revision))
            different = sorted(set(next(rows, {})) ^ set(expected))
            if different:
                return f"expected files of equal columns {expected}, found {file} that differs in {different[0]!r}"
        return f"expected files of equal columns {expected}, found one that differs"

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """See `RowSource.parse`."""
        return cast(Mapping[str, Any], row.content)

    def _open(self, key: str, shard: ShardSpec) -> Any:
        from datasets.distributed import split_dataset_by_node

        dataset = load_stream(self.path, self.name, self.data_files, self.split, self.revision)
        # A buffer of one row shuffles the shards only. The stream shuffles documents itself, because the library
        # loses the content of its shuffle buffer when it resumes.
        dataset = dataset.shuffle(seed=keyed_generator("shards", key).initial_seed() % 2**32, buffer_size=1)
        return split_dataset_by_node(dataset, shard.rank, shard.world_size) if shard.world_size > 1 else dataset


def load_stream(
    path: str, name: str | None, data_files: str | list[str] | None, split: str, revision: str | None
) -> Any:
    """A `datasets.IterableDataset`; arguments as for `load_dataset`.

    Raises:
        FileNotFoundError: the dataset cannot be opened.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name, data_files=data_files, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"expected a dataset that opens as {path!r} (name {name}, data_files {data_files}, split {split}), found: "
            f"{error}; set HubRows in data.parts"
        ) from error
