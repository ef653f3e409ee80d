"""Rows of a Hugging Face dataset, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ptp_lightning.data.streaming.row_source import Position, RawRow, RowSource, Share
from ptp_lightning.utils.pretrained import clear_errors
from ptp_lightning.utils.randomness import keyed_generator

ROWS_AT_ONCE = 64  # between two positions of the library; a run that goes on reads at most so many again


@dataclass(frozen=True)
class HubRows(RowSource):
    """What `datasets.load_dataset` opens as a stream: a hub id, or a format such as `parquet` with files.

    Each epoch reads the dataset's shards in an order of its own. Processes divide the shards if they divide evenly, and
    the rows otherwise. The library's readers know no broken rows, only broken files, which end the run; `JsonLines`
    names the line, or leaves it out.

    Args:
        path: hub id or file format.
        name: configuration of the dataset.
        data_files: files, for a format.
        split: the dataset's own split.
        revision: branch, tag or commit on the hub.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None

    def rows(self, key: str, share: Share, position: Position | None = None) -> Iterator[RawRow]:
        """See `RowSource.rows`.

        Raises:
            FileNotFoundError: the dataset cannot be opened.
            ValueError: a part of it cannot be read.
        """
        dataset = self._opened(key, share)
        skipped = 0
        if position is not None:
            dataset.load_state_dict(position["dataset"])
            skipped = position["within"]
        state = dataset.state_dict()
        # Unlike iteration by row, this does not divide rows among the workers of a data loader, which do it themselves.
        with clear_errors(f"{self.path} (data_files {self.data_files}, split {self.split})", "HubRows.path"):
            for columns in dataset.iter(batch_size=ROWS_AT_ONCE):
                num_rows = len(next(iter(columns.values())))
                for within in range(skipped, num_rows):
                    row = {column: values[within] for column, values in columns.items()}
                    identity = json.dumps(row, sort_keys=True, default=str).encode()
                    position = {"dataset": state, "within": within + 1}
                    yield RawRow(row, f"{self.path}, split {self.split}", identity, position)
                state, skipped = dataset.state_dict(), 0

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """See `RowSource.parse`."""
        return cast(Mapping[str, Any], row.content)

    def _opened(self, key: str, share: Share) -> Any:
        from datasets.distributed import split_dataset_by_node

        dataset = opened(self.path, self.name, self.data_files, self.split, self.revision)
        # A buffer of one row leaves the order inside a shard as it is; the stream shuffles documents itself, because
        # the library forgets the buffer's content when it resumes.
        dataset = dataset.shuffle(seed=keyed_generator("shards", key).initial_seed() % 2**32, buffer_size=1)
        return split_dataset_by_node(dataset, share.rank, share.world) if share.world > 1 else dataset


def opened(path: str, name: str | None, data_files: str | list[str] | None, split: str, revision: str | None) -> Any:
    """A `datasets.IterableDataset`; arguments as in `load_dataset`.

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
