"""Prompts of files: a column of JSON lines, each a user's turn if the tokenizer has a chat template."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptp_lightning.data.rendering import require_unicode, text_at
from ptp_lightning.data.streaming.row_source import BadRowError
from ptp_lightning.utils.chat_templates import chat_prompt, user_message
from ptp_lightning.utils.local_paths import expanded, local_path
from ptp_lightning.utils.text_files import read_lines
from ptp_lightning.utils.text_tokens import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_KEY = "--prompts"
EXPECTED = "a file of JSON lines"
FINAL_PUNCTUATION = ".?!: "


def read_prompt_texts(entries: Sequence[str]) -> list[str]:
    """The texts of all rows, without repetitions.

    Args:
        entries: `FILE:COLUMN` each; the column may be the path of a nested value, see `value_at`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an entry names no column, or a row is invalid; names the line.
    """
    texts: dict[str, str] = {}
    for entry in entries:
        for text in _texts(entry):
            texts.setdefault(same_words(text), text)
    return list(texts.values())


def prompt_token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A user's turn up to the opening of the answer, or the text itself if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        return text_ids(tokenizer, text)
    return chat_prompt(tokenizer, user_message(text))


def prompts_of_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[list[int]]:
    """Token ids of the prompts that texts make.

    Args:
        texts: of `read_prompt_texts`.
        tokenizer: of the teacher.
        max_length: a longer prompt is skipped with a warning; None for no limit.
    """
    prompts = [prompt_token_ids(text, tokenizer) for text in texts]
    short = [prompt for prompt in prompts if max_length is None or len(prompt) <= max_length]
    if num_long := len(prompts) - len(short):
        warnings.warn(
            f"skipped {num_long} prompts of more than {max_length} tokens, after which the model has no positions for "
            "--max_new_tokens more",
            stacklevel=2,
        )
    return short


def same_words(text: str) -> str:
    """What texts have in common that differ in case, blanks and final punctuation alone.

    >>> same_words("What is  1 + 1?") == same_words("what is 1 + 1")
    True
    """
    return " ".join(text.lower().split()).rstrip(FINAL_PUNCTUATION) or text


def _texts(entry: str) -> list[str]:
    name, _, column = entry.rpartition(":")
    whole = local_path(entry, PROMPTS_KEY)
    path = expanded(name)
    if not path.is_file() and whole.is_file():
        raise ValueError(f"expected FILE:COLUMN, found {entry} without a column{_columns(entry)}: set {PROMPTS_KEY}")
    texts = []
    for number, line in read_lines(path, EXPECTED, PROMPTS_KEY):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise BadRowError(f"expected a JSON object, found {line.strip()!r:.40}")
            text = text_at(row, column).strip()
            require_unicode(text)
        except ValueError as error:  # JSONDecodeError and BadRowError are ValueErrors
            raise ValueError(f"{path}, line {number}: {error} (column of {PROMPTS_KEY})") from error
        if text:
            texts.append(text)
    if not texts:
        raise ValueError(f"expected texts in column {column!r} of {path}, found none: set {PROMPTS_KEY}")
    return texts


def _columns(file: str) -> str:
    """The columns of the first row, for an error message; nothing if there is none."""
    try:
        (_, line), *_ = read_lines(file, EXPECTED, PROMPTS_KEY)
        return f" ({', '.join(json.loads(line))})"
    except (ValueError, TypeError):
        return ""
