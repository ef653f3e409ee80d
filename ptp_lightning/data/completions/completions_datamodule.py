"""CompletionsDataModule: packed batches of stored completions of a teacher."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
from torch.utils.data import IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.completions.completions import FOLDER_KEY, CompletionFolder, CompletionSettings, CompletionTable
from ptp_lightning.data.corpus import Split, split_of
from ptp_lightning.data.packed_datamodule import PackedDataModule, require_sizes
from ptp_lightning.data.packing import PackedRow, TokenDocument, pack
from ptp_lightning.data.streaming.stream import DocumentStream, StreamSettings, evaluation_batches
from ptp_lightning.utils.pretrained import load_tokenizer
from ptp_lightning.utils.randomness import keyed_generator


def pack_completions(table: CompletionTable, rows: Sequence[int], row_length: int) -> Iterator[PackedRow]:
    """Rows of documents, each a prompt with its completion.

    Documents are not split, because the completion depends on the whole prompt.

    Raises:
        ValueError: a document is longer than a row.
    """
    return pack((_document(table, row) for row in rows), row_length, allow_split=False)


def _document(table: CompletionTable, row: int) -> TokenDocument:
    prompt, completion = table.prompt_ids.of(row), table.completion_ids.of(row)
    return TokenDocument([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


class CompletionStream(DocumentStream[int]):
    """A `DocumentStream` of the completions of a table.

    Args:
        documents: row numbers of the table.
        table: the completions.
        row_length: S, tokens per row.
        **settings: see `StreamSettings`.
    """

    def __init__(
        self, documents: Sequence[int], table: CompletionTable, *, row_length: int, **settings: Unpack[StreamSettings]
    ) -> None:
        super().__init__(documents, **settings)
        self.table = table
        self.row_length = row_length

    def pack_documents(self, documents: Sequence[int]) -> Iterator[PackedRow]:
        """See `DocumentStream.pack_documents`."""
        return pack_completions(self.table, documents, self.row_length)


class CompletionsDataModule(PackedDataModule):
    """Packed batches of the completions in a folder: an endless training stream, fixed validation and test rows.

    A document is a prompt with its completion, and windows start in completions. All completions of a prompt are in the
    same split, by a hash of the prompt's number. With `DatasetWindows` as the source of windows, a training step calls
    the teacher only once, on the rows.

    Args:
        folder: written by `python -m ptp_lightning pregenerate`.
        row_length: S, tokens per row; at least the length of the longest prompt with its completion.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        eval_rows: number of rows used of the validation and of the test split, evenly spaced over the split.
        shuffle_rows: size of the training stream's shuffle buffer, in rows.
        seed: of the order of documents and rows, and of the window positions.
        allow_incomplete: accept a folder with missing shards.
        tokenizer: path or hub id of the tokenizer; by default the stored one.

    Raises:
        FileNotFoundError: the folder does not exist, or contains no completions.
        ValueError: a size is out of range, or shards are missing.
    """

    def __init__(
        self,
        folder: str,
        row_length: int = 256,
        batch_size: int = 4,
        num_windows: int = 16,
        eval_rows: int = 32,
        shuffle_rows: int = 512,
        seed: int = 0,
        allow_incomplete: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        require_sizes(row_length, batch_size, num_windows, eval_rows)
        self.folder = CompletionFolder.open(folder)
        if not allow_incomplete:
            _require_complete(self.folder)
        self.row_length = row_length
        self.batch_size = batch_size
        self.num_windows = num_windows
        self.eval_rows = eval_rows
        self.shuffle_rows = max(shuffle_rows, 1)
        self.seed = seed
        self.tokenizer_path = self.settings.tokenizer if tokenizer is None else tokenizer
        self._table: CompletionTable | None = None

    @property
    def settings(self) -> CompletionSettings:
        """The common settings of the completions."""
        return self.folder.settings

    @property
    def vocab_size(self) -> int:
        """V, the teacher's vocabulary size."""
        return self.settings.vocab_size

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's end-of-text token id, which ends completions."""
        return self.settings.end_of_text

    def setup(self, stage: str) -> None:
        """Read the completions, and load the tokenizer.

        Raises:
            FileNotFoundError: there are no shards, or there is no tokenizer.
            ValueError: a file does not match the settings, or a document is longer than a row.
        """
        if self._table is None:
            self._table = self.folder.read()
            longest = int((self._table.prompt_ids.lengths + self._table.completion_ids.lengths).max())
            if longest > self.row_length:
                raise ValueError(
                    f"expected data.row_length >= {longest}, the longest prompt with its completion in "
                    f"{self.folder.path}, found {self.row_length}: a split completion would lack its context"
                )
        if self.tokenizer is None and self.tokenizer_path is not None:
            self.tokenizer = load_tokenizer(self.tokenizer_path)

    def training_stream(self) -> IterableDataset[PackedBatch]:
        """See `PackedDataModule.training_stream`."""
        settings: StreamSettings = {
            "batch_size": self.batch_size,
            "num_windows": self.num_windows,
            "shuffle_rows": self.shuffle_rows,
            "seed": self.seed,
            "skip_batches": self.batches_consumed,
        }
        return CompletionStream(self._rows("train"), self._require_table(), row_length=self.row_length, **settings)

    def training_texts(self) -> Iterator[Sequence[int]]:
        """See `PackedDataModule.training_texts`."""
        table = self._require_table()
        return (table.completion_ids.of(row) for row in self._rows_of_split("train"))

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`."""
        rows = list(pack_completions(self._require_table(), self._rows(split), self.row_length))
        generator = keyed_generator(self.seed, split)
        return evaluation_batches(rows, self.eval_rows, self.batch_size, self.num_windows, generator)

    def _require_table(self) -> CompletionTable:
        if self._table is None:
            raise RuntimeError("call setup() before creating a data loader")
        return self._table

    def _rows(self, split: Split) -> Sequence[int]:
        """Row numbers of the table for this rank."""
        shard, of_split = self.shard_spec(), self._rows_of_split(split)
        rows = shard.select(of_split)
        if not rows:
            num_prompts = len(np.unique(self._require_table().prompts[of_split]))
            raise ValueError(
                f"expected completions in the {split} split of {self.folder.path} for rank {shard.rank} of "
                f"{shard.world_size}, found {num_prompts} prompts there: pregenerate more prompts (90 % train, 5 % "
                f"validation, 5 % test) or set {FOLDER_KEY}"
            )
        return rows

    def _rows_of_split(self, split: Split) -> list[int]:
        """Row numbers of the table for all ranks."""
        prompts = self._require_table().prompts
        chosen = [number for number in np.unique(prompts).tolist() if split_of(f"prompt {number}") == split]
        return np.flatnonzero(np.isin(prompts, chosen)).tolist()


def _require_complete(folder: CompletionFolder) -> None:
    missing, num_shards = len(folder.missing_shards()), folder.settings.num_shards
    if missing:
        raise ValueError(
            f"expected {num_shards} shards of completions in {folder.path}, found {num_shards - missing}: continue "
            f"`python -m ptp_lightning pregenerate --output {folder.path}` with the same options, or set "
            "data.allow_incomplete: true"
        )
