"""Documents of a Hugging Face dataset, read as a stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ptp_lightning.data.corpus import Corpus, Document, Split, split_of
from ptp_lightning.data.hub_rows import opened


@dataclass(frozen=True)
class HubDataset(Corpus):
    """One text column of a dataset that `datasets.load_dataset` opens: a hub id, or a format such as `json`.

    Splits follow a hash of each row's number, so they are the same on every run.

    Args:
        path: hub id or file format, as in `load_dataset`.
        column: the text column.
        name: configuration of the dataset.
        data_files: files, for a format.
        dataset_split: the dataset's own split to read from.
        limit: rows that are read; documents are kept in memory, so this bounds it.
    """

    path: str
    column: str = "text"
    name: str | None = None
    data_files: str | list[str] | None = None
    dataset_split: str = "train"
    limit: int = 20_000

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the rows of `split` in the dataset's order.

        Raises:
            FileNotFoundError: the dataset cannot be opened.
            ValueError: it has no such column.
        """
        rows = opened(self.path, self.name, self.data_files, self.dataset_split, None, "data.corpus")
        for number, row in enumerate(islice(rows, self.limit)):
            if self.column not in row:
                raise ValueError(
                    f"expected a column {self.column!r} in {self.path!r}, found {sorted(row)}: mend data.corpus.column"
                )
            name = f"{self.path}/{number}"
            if split_of(name) == split:
                yield Document(name, row[self.column])
