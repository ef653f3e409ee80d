"""CorpusDataModule: corpora as streams of packed batches that a checkpoint can rewind."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from torch.utils.data import IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Corpus, Document, Split
from ptp_lightning.data.packed_datamodule import require_sizes
from ptp_lightning.data.packing import PackedRow, TokenDocument, pack
from ptp_lightning.data.streaming.stream import DocumentStream, StreamSettings, evaluation_batches, no_rows
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.utils.randomness import keyed_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenized(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Token ids of each document, closed by the end-of-text token when the tokenizer has one."""
    end_of_text: Any = tokenizer.eos_token_id
    end = [] if end_of_text is None else [end_of_text]
    for document in documents:
        yield tokenizer.encode(document.text, add_special_tokens=False, verbose=False) + end


class TrainingStream(DocumentStream[Document]):
    """The documents of a corpus as a `DocumentStream`.

    Args:
        documents: the training documents of this rank.
        tokenizer: turns text into ids.
        row_length: S, tokens per row.
        **settings: as of `DocumentStream`.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        row_length: int,
        **settings: Unpack[StreamSettings],
    ) -> None:
        super().__init__(documents, **settings)
        self.tokenizer = tokenizer
        self.row_length = row_length

    def packed(self, documents: Sequence[Document]) -> Iterator[PackedRow]:
        """See `DocumentStream.packed`."""
        return pack(tokenized(documents, self.tokenizer), self.row_length)


class CorpusDataModule(TextDataModule):
    """Packed batches of a text corpus: an endless training stream, fixed validation and test rows.

    Args:
        corpus: where the documents come from.
        tokenizer: whose tokens: `embedded`, a hub id, a folder or a GGUF file; the one of the model.
        row_length: S, tokens per row.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        eval_rows: rows of the validation and of the test split that are used, taken evenly over the split.
        shuffle_rows: size of the training stream's shuffle buffer, in rows.
        seed: of every draw in here.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: str = "embedded",
        row_length: int = 256,
        batch_size: int = 4,
        num_windows: int = 16,
        eval_rows: int = 32,
        shuffle_rows: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer)
        require_sizes(row_length, batch_size, num_windows, eval_rows)
        self.corpus = corpus
        self.row_length = row_length
        self.batch_size = batch_size
        self.num_windows = num_windows
        self.eval_rows = eval_rows
        self.shuffle_rows = max(shuffle_rows, 1)
        self.seed = seed

    def training_stream(self) -> IterableDataset[PackedBatch]:
        """See `PackedDataModule.training_stream`."""
        return TrainingStream(
            self._documents("train"),
            self.require_tokenizer(),
            row_length=self.row_length,
            batch_size=self.batch_size,
            num_windows=self.num_windows,
            shuffle_rows=self.shuffle_rows,
            seed=self.seed,
            skip_batches=self.batches_consumed,
        )

    def training_documents(self, wanted: int | None) -> Iterator[TokenDocument]:
        """See `TextDataModule.training_documents`; taken evenly over the corpus."""
        documents = [document for document in self._all_documents("train") if document.text]
        count = len(documents) if wanted is None else min(wanted, len(documents))
        chosen = [documents[index * len(documents) // count] for index in range(count)]
        for token_ids in tokenized(chosen, self.require_tokenizer()):
            yield TokenDocument(token_ids, [True] * len(token_ids))

    def _documents(self, split: Split) -> list[Document]:
        """This rank's documents of a split."""
        rank, world = self.rank_and_world()
        return self._all_documents(split)[rank::world]

    def _all_documents(self, split: Split) -> list[Document]:
        documents = list(self.corpus.documents(split))
        if not any(document.text for document in documents):
            raise ValueError(
                f"expected text in the {split} split of {self.corpus}, found {len(documents)} documents without any: "
                "set data.corpus (with few files, held_out: lines splits inside each file)"
            )
        return documents

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`."""
        documents = self._documents(split)
        rows = list(pack(tokenized(documents, self.require_tokenizer()), self.row_length))
        if not rows:
            raise no_rows(split, len(documents))
        generator = keyed_generator(self.seed, split)
        return evaluation_batches(rows, self.eval_rows, self.batch_size, self.num_windows, generator)
