"""Train a byte-level BPE tokenizer on a corpus, as the embedded tokenizer was trained.

python -m ptp_lightning.data.tokenizer --output DIR [--vocab_size 2048]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ptp_lightning.data.corpus import Corpus, StandardLibrary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# BPE never merges across these pieces: a line break with its indentation, a word with its leading blank, up to three
# digits.
PRE_TOKEN_PATTERN = r"\s*\n[ \t]*| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+|\s+"


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` entries, trained on the training split of a corpus; id 0 is the end of text.

    Any text can be encoded and decodes back to itself. The same corpus gives the same tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus.documents("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def main() -> None:
    """Train on Python's standard library and write tokenizer.json and tokenizer_config.json."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=2048)
    args = parser.parse_args()
    train_tokenizer(StandardLibrary(), args.vocab_size).save_pretrained(args.output)


if __name__ == "__main__":
    main()
