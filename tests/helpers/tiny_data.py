"""A tokenizer of letters and a corpus of strings, for tests: the tokens can be read from the text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptp_lightning.data.corpus import Corpus, Document, Split
from ptp_lightning.data.datamodule import CorpusDataModule

END_OF_TEXT = "<|end|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz ?"
"""Token ids: 0 is the end of text, 1 is a, 2 is b, .., 28 is the unknown token."""

TEXTS = [letter * 3 + ALPHABET[start : start + 9] + letter * 5 for start, letter in enumerate("abcdefghij")]


def tiny_tokenizer(end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """Each letter is a token."""
    entries = [END_OF_TEXT, *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT if end_of_text else None)


@dataclass(frozen=True)
class Texts(Corpus):
    """The given strings, the same in every split unless `held_out` is given."""

    texts: list[str] = field(default_factory=lambda: list(TEXTS))
    held_out: list[str] | None = None

    def documents(self, split: Split) -> Iterator[Document]:
        texts = self.texts if split == "train" or self.held_out is None else self.held_out
        for number, text in enumerate(texts):
            yield Document(f"{number}.txt", text)


def tiny_data(corpus: Corpus | None = None, end_of_text: bool = True, **settings: Any) -> CorpusDataModule:
    """Two rows of 12 letters per batch; `settings` are further arguments of `CorpusDataModule`."""
    defaults = {"row_length": 12, "batch_size": 2, "num_windows": 3, "eval_rows": 4, "shuffle_rows": 4}
    module = CorpusDataModule(corpus or Texts(), **(defaults | settings))
    module.tokenizer = tiny_tokenizer(end_of_text)
    return module
