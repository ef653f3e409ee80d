"""Renderings: a row's columns to the tokens of a document, and which of them are to be learned.

A new shape of data is one class with `document`, plus one `class_path` line of YAML.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.streaming.row_source import BadRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How data sets call those who speak, as chat templates call them.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Rendering(ABC):
    """How a row becomes a document."""

    @abstractmethod
    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """Tokens of the row, closed by the tokenizer's end-of-text token where it has one.

        Raises:
            BadRowError: a column is missing or holds something else; names the key.
        """

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that cannot do it, before any row is read; raises ValueError."""
        del tokenizer


@dataclass(frozen=True)
class PlainText(Rendering):
    """One column of text, all of which is learned.

    Args:
        column: its name, or a way to it (see `value_at`).
    """

    column: str = "text"

    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """See `Rendering.document`."""
        ids = token_ids(text_at(row, self.column), tokenizer) + end_of_text(tokenizer)
        return TokenDocument(ids, [True] * len(ids))


@dataclass(frozen=True)
class PromptAndCompletion(Rendering):
    """A prompt and what follows it, which alone is learned.

    Args:
        prompt: text with columns in braces, `"{description}\\n"` for instance (`{{` stands for a brace).
        completion: the same, of what follows; the end-of-text token belongs to it.
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
    """A conversation, put into words by a chat template; what the assistant says is learned.

    Args:
        column: of a list of messages.
        role: the entry of a message that says who speaks: `role`, or `from` as in ShareGPT.
        content: the entry with the words: `content`, or `value` as in ShareGPT.
        template: a chat template in Jinja; by default the tokenizer's own.
        roles: how other names of speakers are to be read, besides `human` and `gpt` and the like.
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
                "template, or take the tokenizer of a chat model"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer for ptp_lightning.data.Chat, found {type(tokenizer).__name__}, which "
                "cannot say where in the text its tokens stand"
            )

    def document(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
        """See `Rendering.document`; the template's own end of a turn belongs to what the assistant says."""
        messages = self._messages(row)
        text, spans = self._spans(messages, tokenizer)
        require_unicode(text)
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        learned = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
        closing = end_of_text(tokenizer)
        if closing and ids[-1:] == closing:
            closing = []
        return TokenDocument(ids + closing, learned + [messages[-1]["role"] == "assistant"] * len(closing))

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
            speaker, words = str(message[self.role]), str(message[self.content])
            messages.append({"role": (ROLES | self.roles).get(speaker, speaker), "content": words})
        return messages

    def _spans(
        self, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and from where to where in it the assistant speaks.

        What a message adds is what the text has more than the text before it, so templates need no marks of their own.
        """
        spans: list[tuple[int, int]] = []
        whole = self._rendered(messages, tokenizer)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], tokenizer, add_generation_prompt=True) if number else ""
            behind = self._rendered(messages[: number + 1], tokenizer)
            if not (whole.startswith(before) and whole.startswith(behind)):
                raise BadRowError(
                    "expected a chat template that adds each message behind those before it, found that message "
                    f"{number + 1} changes them: set the template of ptp_lightning.data.Chat"
                )
            spans.append((len(before), len(behind)))
        return whole, spans

    def _rendered(
        self, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            text: Any = tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like, of roles that they do not know for instance
            raise BadRowError(f"the chat template refuses a conversation: {error}") from error
        return text


def value_at(row: Mapping[str, Any], way: str) -> Any:
    """A column, or what lies deeper in it: `solutions.solution.0` is the first entry of a list in a column's entry.

    Raises:
        BadRowError: there is nothing.
    """
    if way in row:  # a column may have a point in its name
        return row[way]
    found: Any = row
    for step in way.split("."):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, Sequence) and not isinstance(found, str) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            there = sorted(found) if isinstance(found, Mapping) else f"{type(found).__name__} {found!r:.40}"
            raise BadRowError(f"expected a column {way!r}, found no {step!r} in {there}: set the column in data.parts")
    return found


def text_at(row: Mapping[str, Any], way: str) -> str:
    """The text at `value_at`; raises BadRowError where it is none."""
    found = value_at(row, way)
    if not isinstance(found, str):
        raise BadRowError(f"expected text in column {way!r}, found {type(found).__name__} {found!r:.40}")
    return found


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of the text alone; raises BadRowError as `require_unicode`."""
    require_unicode(text)
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def require_unicode(text: str) -> None:
    """Refuse what JSON can spell and no tokenizer reads, half of a surrogate pair.

    Raises:
        BadRowError: says where it stands.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"expected Unicode text, found {error}") from error


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that closes a document, if there is one."""
    found: Any = tokenizer.eos_token_id
    return [] if found is None else [found]


def _filled(pattern: str, row: Mapping[str, Any]) -> str:
    parts = Formatter().parse(pattern)
    return "".join(text + ("" if way is None else text_at(row, way)) for text, way, _, _ in parts)
