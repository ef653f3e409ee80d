"""CorpusDataModule: packed batches of a text corpus, resumable from a checkpoint."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from torch.utils.data import IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Corpus, Document, Split
from ptp_lightning.data.packed_datamodule import require_sizes
from ptp_lightning.data.packing import PackedRow, TokenDocument, pack
from ptp_lightning.data.streaming.stream import DocumentStream, StreamSettings, empty_split_error, evaluation_batches
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.utils.randomness import keyed_generator
from ptp_lightning.utils.text_tokens import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Token ids of each document, see `text_ids`, followed by the end-of-text token if the tokenizer has one."""
    end_of_text: Any = tokenizer.eos_token_id
    end = [] if end_of_text is None else [end_of_text]
    for document in documents:
        yield (text_ids(tokenizer, document.text) if document.text else []) + end


class TrainingStream(DocumentStream[Document]):
    """A `DocumentStream` of the documents of a corpus.

    Args:
        documents: the training documents of this rank.
        tokenizer: of the model.
        row_length: S, tokens per row.
        **settings: see `StreamSettings`.
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

    def pack_documents(self, documents: Sequence[Document]) -> Iterator[PackedRow]:
        """See `DocumentStream.pack_documents`."""
        return pack(tokenize(documents, self.tokenizer), self.row_length)


class CorpusDataModule(TextDataModule):
    """Packed batches of a text corpus: an endless training stream, fixed validation and test rows.

    Args:
        corpus: source of the documents.
        tokenizer: of the model: `embedded`, a hub id, a folder or a GGUF file.
        row_length: S, tokens per row.
        batch_size: B, rows per batch and rank.
        num_windows: N, windows per row.
        eval_rows: number of rows used of the validation and of the test split, evenly spaced over the split.
        shuffle_rows: size of the training stream's shuffle buffer, in rows.
        seed: of the order of documents and rows, and of the window positions.
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

    def training_documents(self, num_documents: int | None) -> Iterator[TokenDocument]:
        """See `TextDataModule.training_documents`; the documents are evenly spaced over the corpus."""
        documents = [document for document in self._all_documents("train") if document.text]
        count = len(documents) if num_documents is None else min(num_documents, len(documents))
        chosen = [documents[index * len(documents) // count] for index in range(count)]
        for token_ids in tokenize(chosen, self.require_tokenizer()):
            yield TokenDocument(token_ids, [True] * len(token_ids))

    def _documents(self, split: Split) -> Sequence[Document]:
        """This rank's documents of a split."""
        return self.shard_spec().select(self._all_documents(split))

    def _all_documents(self, split: Split) -> list[Document]:
        documents = list(self.corpus.documents(split))
        if not any(document.text for document in documents):
            raise ValueError(
                f"expected text in the {split} split of {self.corpus}, found {len(documents)} documents without text: "
                f"{self.corpus.advice}"
            )
        return documents

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        """See `PackedDataModule.fixed_batches`."""
        documents = self._documents(split)
        rows = list(pack(tokenize(documents, self.require_tokenizer()), self.row_length))
        if not rows:
            raise empty_split_error(split, len(documents))
        generator = keyed_generator(self.seed, split)
        return evaluation_batches(rows, self.eval_rows, self.batch_size, self.num_windows, generator)
