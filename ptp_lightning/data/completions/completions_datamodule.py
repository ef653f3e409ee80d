"""CompletionsDataModule: completions that a teacher has written before, as packed batches."""

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


def packed_completions(table: CompletionTable, rows: Sequence[int], row_length: int) -> Iterator[PackedRow]:
    """Prompt and completion as one document each, never cut: what the teacher wrote depends on all that stands before.

    Raises:
        ValueError: one is longer than a row.
    """
    return pack((_document(table, row) for row in rows), row_length, cut=False)


def _document(table: CompletionTable, row: int) -> TokenDocument:
    prompt, completion = table.prompt_ids.of(row), table.completion_ids.of(row)
    return TokenDocument([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


class CompletionStream(DocumentStream[int]):
    """The completions of a table as a `DocumentStream`.

    Args:
        documents: which rows of the table.
        table: the completions.
        row_length: S, tokens per row.
        **settings: as of `DocumentStream`.
    """

    def __init__(
        self, documents: Sequence[int], table: CompletionTable, *, row_length: int, **settings: Unpack[StreamSettings]
    ) -> None:
        super().__init__(documents, **settings)
        self.table = table
        self.row_length = row_length

    def packed(self, documents: Sequence[int]) -> Iterator[PackedRow]:
        """See `DocumentStream.packed`."""
        return packed_completions(self.table, documents, self.row_length)


class CompletionsDataModule(PackedDataModule):
    """Packed batches of the completions in a folder: an endless training stream, fixed validation and test rows.

    A document is a prompt and what the teacher wrote after it; windows start on what it wrote. All completions of a
    prompt are in the same split, by a hash of its number. With `DatasetWindows` as the source, training needs no calls
    of the teacher but the one over the rows.

    Args:
        folder: what `python -m ptp_lightning pregenerate` has written.
        row_length: S, tokens per row; the longest prompt with its completion must fit.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        eval_rows: rows of the validation and of the test split that are used, taken evenly over the split.
        shuffle_rows: size of the training stream's shuffle buffer, in rows.
        seed: of every draw in here.
        allow_incomplete: whether a folder may do in which shards are still missing.
        tokenizer: where the tokenizer of the prompts is now, if it is not where it was.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of completions in it.
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
        """What the folder's completions have in common."""
        return self.folder.settings

    @property
    def vocab_size(self) -> int:
        """Of the teacher."""
        return self.settings.vocab_size

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's end-of-text token, after which the teacher stopped."""
        return self.settings.end_of_text

    def setup(self, stage: str) -> None:
        """Read the completions, and load the tokenizer.

        Raises:
            FileNotFoundError: there is no shard, or no tokenizer.
            ValueError: a file is not what the settings say, or a document is longer than a row.
        """
        if self._table is None:
            self._table = self.folder.read()
            longest = int((self._table.prompt_ids.lengths + self._table.completion_ids.lengths).max())
            if longest > self.row_length:
                raise ValueError(
                    f"expected data.row_length >= {longest}, the longest prompt with its completion in "
                    f"{self.folder.path}, found {self.row_length}: a completion that is cut would follow something else"
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

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`."""
        rows = list(packed_completions(self._require_table(), self._rows(split), self.row_length))
        generator = keyed_generator(self.seed, split)
        return evaluation_batches(rows, self.eval_rows, self.batch_size, self.num_windows, generator)

    def _require_table(self) -> CompletionTable:
        if self._table is None:
            raise RuntimeError("call setup() before asking for a data loader")
        return self._table

    def _rows(self, split: Split) -> list[int]:
        """This rank's rows of the table."""
        prompts = self._require_table().prompts
        chosen = [number for number in np.unique(prompts).tolist() if split_of(f"prompt {number}") == split]
        rank, world = self.rank_and_world()
        rows = np.flatnonzero(np.isin(prompts, chosen)).tolist()[rank::world]
        if not rows:
            raise ValueError(
                f"expected completions in the {split} split of {self.folder.path} for rank {rank} of {world}, found "
                f"{len(chosen)} prompts there: pregenerate more prompts (of 100 about 90 train, 5 validate, 5 test) or "
                f"set {FOLDER_KEY}"
            )
        return rows


def _require_complete(folder: CompletionFolder) -> None:
    missing, num_shards = len(folder.missing()), folder.settings.num_shards
    if missing:
        raise ValueError(
            f"expected {num_shards} shards of completions in {folder.path}, found {num_shards - missing}: go on with "
            f"`python -m ptp_lightning pregenerate --output {folder.path}` and the options it was begun with, or set "
            "data.allow_incomplete: true"
        )
