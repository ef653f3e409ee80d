"""Token ids of texts: one rule for the tokens before a text, in training documents and in prompts alike.

A text begins with the tokens that the tokenizer itself puts before it, the beginning-of-text token of Llama and Gemma
for example, and of other models nothing. A text that begins with them already gets no second ones. A chat template
writes all special tokens of a conversation, so that its text is encoded as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a"  # any text


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with the tokens before it; without those after it, so that the text can be continued."""
    opening, ids = opening_ids(tokenizer), ids_as_written(tokenizer, text)
    return ids if ids[: len(opening)] == opening else opening + ids


def ids_as_written(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without special tokens but those that it spells out.

    Raises:
        ValueError: it is no Unicode text: bytes of a command line that are not UTF-8, or escapes of a JSON file.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected Unicode text, found {error}: write it in UTF-8") from error
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text; empty for most models without a beginning-of-text token."""
    own, all_ids = ids_as_written(tokenizer, PROBE), tokenizer.encode(PROBE, verbose=False)
    begin = next((k for k in range(len(all_ids)) if all_ids[k : k + len(own)] == own), 0)
    return all_ids[:begin]
