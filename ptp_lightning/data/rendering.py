"""Renderings: the columns of a row as a tokenised document, with a mask of the tokens to learn.

A new data format is one class with `document`, and one `class_path` line in a configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.streaming.row_source import BadRowError
from ptp_lightning.utils.chat_templates import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Role names of data sets, and the names that chat templates use.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Rendering(ABC):
    """Turns a row into a tokenised document."""

    @abstractmethod
    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """Tokens of the row, followed by the end-of-text token if the tokenizer has one.

        Raises:
            BadRowError: a column is missing or has another type; the message names the configuration key.
        """

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
        ids = token_ids(text_at(row, self.column), tokenizer) + end_of_text(tokenizer)
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
        prompt, completion = (token_ids(_filled(part, row), tokenizer) for part in (self.prompt, self.completion))
        completion += end_of_text(tokenizer)
        return TokenDocument(prompt + completion, [False] * len(prompt) + [True] * len(completion))


@dataclass(frozen=True)
class Chat(Rendering):
    """A conversation, formatted by a chat template; only the assistant's messages are learned.

    Args:
        column: of the list of messages.
        role: key of a message's role: `role`, or `from` in ShareGPT's format.
        content: key of a message's text: `content`, or `value` in ShareGPT's format.
        template: Jinja chat template; by default the tokenizer's.
        roles: additional role names and the chat template's names for them; `human`, `gpt` and similar are known.
    """

    column: str = "messages"
    role: str = "role"
    content: str = "content"
    template: str | None = None
    roles: dict[str, str] = field(default_factory=dict)

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """See `Rendering.require_tokenizer`."""
        if self.template is None and tokenizer.chat_template is None:
            raise ValueError(
                "expected a tokenizer with a chat template for ptp_lightning.data.Chat, found one without: set its "
                "template, or set data.tokenizer to that of a chat model"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer for ptp_lightning.data.Chat, found {type(tokenizer).__name__}, which "
                "does not return the character offsets of tokens: set data.tokenizer"
            )

    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """See `Rendering.document`; the end-of-turn token of the template is part of the assistant's message."""
        messages = self._messages(row)
        text, spans = self._spans(messages, tokenizer)
        require_unicode(text)
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        is_completion = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
        closing = end_of_text(tokenizer)
        if closing and ids[-1:] == closing:
            closing = []
        return TokenDocument(ids + closing, is_completion + [messages[-1]["role"] == "assistant"] * len(closing))

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        found = value_at(row, self.column)
        if not isinstance(found, list) or not found:
            raise BadRowError(f"expected a list of messages in column {self.column!r}, found {found!r:.80}")
        messages: list[dict[str, str]] = []
        for message in found:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(entry), str) for entry in (self.role, self.content)
            ):
                raise BadRowError(
                    f"expected messages with {self.role!r} and {self.content!r} in column {self.column!r}, found "
                    f"{message!r:.80}: set role and content of ptp_lightning.data.Chat"
                )
            role, content = str(message[self.role]), str(message[self.content])
            messages.append({"role": (ROLES | self.roles).get(role, role), "content": content})
        return messages

    def _spans(
        self, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, list[tuple[int, int]]]:
        """The formatted text, and the character ranges of the assistant's messages.

        A message's range is what it adds to the text of the messages before it, so no markers are needed in templates.
        """
        spans: list[tuple[int, int]] = []
        text = self._rendered(messages, tokenizer)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], tokenizer, add_generation_prompt=True) if number else ""
            after = self._rendered(messages[: number + 1], tokenizer)
            if not (text.startswith(before) and text.startswith(after)):
                raise BadRowError(
                    "expected a chat template that appends each message to the previous ones, found that message "
                    f"{number + 1} changes them: set template of ptp_lightning.data.Chat"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _rendered(
        self, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            return render_chat(tokenizer, messages, template=self.template, add_generation_prompt=add_generation_prompt)
        except ValueError as error:
            raise BadRowError(str(error)) from error


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


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text without special tokens; raises as `require_unicode`."""
    require_unicode(text)
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


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
