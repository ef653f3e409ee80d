"""Renderings: the columns of a row as a tokenised document, with a mask of the tokens to learn.

A new data format is one class with `document`, and one `class_path` line in a configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.streaming.row_source import BadRowError
from ptp_lightning.utils.text_tokens import ids_as_written, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendering(ABC):
    """Turns a row into a tokenised document."""

    @abstractmethod
    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """Tokens of the row, followed by the end-of-text token if the tokenizer has one.

        Raises:
            BadRowError: a column is missing or has another type; the message names the configuration key.
        """

    def documents(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[TokenDocument]:
        """All documents of the row: one, unless a rendering says otherwise. Raises as `document`."""
        return [self.document(row, tokenizer)]

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the tokenizer can be used, before any row is read; raises ValueError."""
        del tokenizer


@dataclass(frozen=True)
class PlainText(Rendering):
    """One column of text; all tokens are learned.

    Args:
        column: name, or path to a nested value, see `value_at`.
    """

    column: str = "text"

    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """See `Rendering.document`."""
        ids = token_ids(text_at(row, self.column), tokenizer, begins=True) + end_of_text(tokenizer)
        return TokenDocument(ids, [True] * len(ids))


@dataclass(frozen=True)
class PromptAndCompletion(Rendering):
    """A prompt and its completion; only the completion is learned.

    Args:
        prompt: template with column names in braces, for example `"{description}\\n"`; `{{` is a literal brace.
        completion: template of the completion, which includes the end-of-text token.
    """

    prompt: str
    completion: str

    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """See `Rendering.document`."""
        prompt = token_ids(_filled(self.prompt, row), tokenizer, begins=True)
        completion = token_ids(_filled(self.completion, row), tokenizer, begins=not prompt) + end_of_text(tokenizer)
        return TokenDocument(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """A column, or a value nested in it.

    Raises:
        BadRowError: there is no such value.

    >>> value_at({"solutions": {"solution": ["def f(): ..."]}}, "solutions.solution.0")
    'def f(): ...'
    """
    if path in row:  # a column name may contain a dot
        return row[path]
    found: Any = row
    for step in path.split("."):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, Sequence) and not isinstance(found, str) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            present = sorted(found) if isinstance(found, Mapping) else f"{type(found).__name__} {found!r:.40}"
            raise BadRowError(
                f"expected a column {path!r}, found no {step!r} in {present}: set the column in data.parts"
            )
    return found


def text_at(row: Mapping[str, Any], path: str) -> str:
    """The text at a path, see `value_at`; raises BadRowError if the value is not text."""
    found = value_at(row, path)
    if not isinstance(found, str):
        raise BadRowError(f"expected text in column {path!r}, found {type(found).__name__} {found!r:.40}")
    return found


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, begins: bool) -> list[int]:
    """Token ids of a text, none of an empty one; raises as `require_unicode`.

    Args:
        text: a text or a part of it.
        tokenizer: of the model.
        begins: whether the part is the first, which begins as `text_ids` says.
    """
    require_unicode(text)
    return text_ids(tokenizer, text) if begins and text else ids_as_written(tokenizer, text)


def require_unicode(text: str) -> None:
    """Reject unpaired surrogates, which JSON can contain and no tokenizer accepts.

    Raises:
        BadRowError: with the position in the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"expected Unicode text, found {error}") from error


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-text token as a list; empty if the tokenizer has none."""
    found: Any = tokenizer.eos_token_id
    return [] if found is None else [found]


def _filled(pattern: str, row: Mapping[str, Any]) -> str:
    parts = Formatter().parse(pattern)
    return "".join(text + ("" if path is None else text_at(row, path)) for text, path, _, _ in parts)
