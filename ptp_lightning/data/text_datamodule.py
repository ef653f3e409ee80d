"""TextDataModule: what data modules have in common whose tokens come from text."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.utils.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(PackedDataModule):
    """A data module with a tokenizer, which `setup` loads; data are read when a loader is asked for.

    Args:
        tokenizer: `embedded`, a hub id, a folder or a GGUF file; the one of the model.
    """

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.tokenizer_path = tokenizer

    def setup(self, stage: str) -> None:
        """Load the tokenizer."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.tokenizer_path)

    @abstractmethod
    def training_documents(self, wanted: int | None) -> Iterator[TokenDocument]:
        """Documents of the training split, uncut, the same ones in the same order on every call; for all processes.

        Args:
            wanted: so many are needed, of which each class says how it chooses them; None is all of them, once each.
        """

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return len(self.require_tokenizer())

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's end-of-text token, which closes every document."""
        end_of_text: Any = self.require_tokenizer().eos_token_id
        return end_of_text

    def require_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The loaded tokenizer; raises RuntimeError before `setup`."""
        if self.tokenizer is None:
            raise RuntimeError("call setup() before asking for a data loader or the vocabulary")
        return self.tokenizer
