"""TextDataModule: base class of the data modules whose tokens come from text."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.utils.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(PackedDataModule):
    """A data module with a tokenizer, loaded by `setup`; data are read when a data loader is created.

    Args:
        tokenizer: of the model: `embedded`, a hub id, a folder or a GGUF file.
    """

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.tokenizer_path = tokenizer

    def setup(self, stage: str) -> None:
        """Load the tokenizer."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.tokenizer_path)

    @abstractmethod
    def training_documents(self, num_documents: int | None) -> Iterator[TokenDocument]:
        """Whole documents of the training split, the same in the same order on every call and on every rank.

        Args:
            num_documents: how many are needed; which ones is up to the class. None: all, once each.
        """

    def training_texts(self) -> Iterator[Sequence[int]]:
        """See `PackedDataModule.training_texts`."""
        for document in self.training_documents(None):
            yield list(compress(document.token_ids, document.completion_mask))

    @property
    def vocab_size(self) -> int:
        """V, the size of the tokenizer's vocabulary."""
        return len(self.require_tokenizer())

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's end-of-text token id, which ends every document."""
        end_of_text: Any = self.require_tokenizer().eos_token_id
        return end_of_text

    def require_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The loaded tokenizer; raises RuntimeError before `setup`."""
        if self.tokenizer is None:
            raise RuntimeError("call setup() before creating a data loader or reading the vocabulary size")
        return self.tokenizer
