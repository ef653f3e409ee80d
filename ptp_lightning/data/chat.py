"""Chat: conversations, formatted by a chat template, with tools, tool calls and reasoning; answers are learned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.rendering import Rendering, end_of_text, require_unicode, value_at
from ptp_lightning.data.streaming.row_source import BadRowError
from ptp_lightning.utils.chat_templates import Message, render_chat
from ptp_lightning.utils.pretrained import few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # that templates know
# Speakers of data sets, in lower case, and the roles that chat templates know.
ROLES = {role: role for role in TEMPLATE_ROLES} | {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of templates for the thoughts before an answer
# What an assistant's message may consist of in place of `content`.
OTHER_CONTENT = frozenset({"tool_calls", "function_call", *REASONING})

Span = tuple[int, int]
"""Range of characters of a text: begin, end."""


@dataclass(frozen=True)
class Chat(Rendering):
    """A conversation, formatted by a chat template; only the assistant's messages are learned.

    Messages have the form that transformers' chat templates take: content is text, a list of parts of text, or null in
    a message with tool calls; all other entries, `tool_calls` and `reasoning_content` for instance, reach the template.

    Args:
        column: of the list of messages.
        role: key of a message's speaker: `role`, or `from` in ShareGPT's format.
        content: key of a message's text: `content`, or `value` in ShareGPT's format.
        template: Jinja chat template; by default the tokenizer's.
        roles: speakers of the data and the template's roles for them, for example `{narrator: system}`. Known without
            it, in any case of letters: the roles of templates, `human`, `gpt`, `chatgpt`, `bing`, `bard`, `bot` and
            `model`.
        tools: column of the tools, a list of JSON schemas; rows without it have none. None ignores the column.
        reasoning: whether the reasoning before an answer is learned; a template that does not write it is refused then.
    """

    column: str = "messages"
    role: str = "role"
    content: str = "content"
    template: str | None = None
    roles: dict[str, str] = field(default_factory=dict)
    tools: str | None = "tools"
    reasoning: bool = True

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
        """See `Rendering.document`; raises BadRowError for a conversation of several documents, see `documents`."""
        *earlier, document = self.documents(row, tokenizer)
        if earlier:
            raise BadRowError(
                f"expected a conversation that its chat template writes as one document, found {len(earlier) + 1}: "
                "call documents, or set template of ptp_lightning.data.Chat"
            )
        return document

    def documents(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[TokenDocument]:
        """See `Rendering.documents`; the end-of-turn token of the template is part of the assistant's message.

        A template may change earlier messages, as that of Qwen3 does, which leaves out earlier reasoning. The
        conversation then becomes several documents, each of which ends with an answer, in its context as the template
        writes it when the answer is generated. Every answer is learned in one of them.
        """
        messages, tools = self._messages(row), self._tools(row)
        return [_tokenized(text, tokenizer) for text in self._formatted(messages, tools, tokenizer)]

    def _messages(self, row: Mapping[str, Any]) -> list[Message]:
        found = value_at(row, self.column)
        if not isinstance(found, list) or not found:
            raise BadRowError(f"expected a list of messages in column {self.column!r}, found {found!r:.80}")
        return [self._message(message) for message in found]

    def _message(self, given: object) -> Message:
        if not isinstance(given, Mapping) or not isinstance(given.get(self.role), str):
            raise self._bad_message(given)
        # Columnar files give each message all keys, with null for those it lacks. transformers' templates get no nulls.
        message: Message = {
            key: value
            for key, value in given.items()
            if key not in (self.role, self.content) and value is not None and not (key == "tool_calls" and not value)
        }
        if not self.reasoning:
            message = {key: value for key, value in message.items() if key not in REASONING}
        message["role"] = self._role(str(given[self.role]))
        if calls := message.get("tool_calls"):
            message["tool_calls"] = _parsed_calls(calls)
        if call := message.get("function_call"):
            message["function_call"] = _parsed_call(call)
        content: Any = given.get(self.content)
        if content is None:
            if not OTHER_CONTENT & message.keys():
                raise self._bad_message(given)
        elif isinstance(content, list):
            content = [_text_part(part) for part in content]
        elif not isinstance(content, str):
            raise self._bad_message(given)
        return message if content is None else message | {"content": content}

    def _bad_message(self, found: object) -> BadRowError:
        return BadRowError(
            f"expected messages with {self.role!r} and {self.content!r} in column {self.column!r}, found "
            f"{found!r:.80}: set role and content of ptp_lightning.data.Chat"
        )

    def _role(self, speaker: str) -> str:
        role = self.roles.get(speaker) or ROLES.get(speaker.lower())
        if role is None:
            raise BadRowError(
                f"expected a speaker among {', '.join(sorted(ROLES | self.roles))}, found {speaker!r:.80}: set roles "
                f"of ptp_lightning.data.Chat, for example roles: {{{speaker:.80}: assistant}}"
            )
        return role

    def _tools(self, row: Mapping[str, Any]) -> list[Any] | None:
        found: Any = None if self.tools is None else row.get(self.tools)
        if isinstance(found, str):  # data sets store the schemas as JSON, because their keys differ from row to row
            found = _parsed_json(found)
        if not found:
            return None
        if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
            raise BadRowError(
                f"expected a list of JSON schemas in column {self.tools!r}, found {found!r:.80}: set tools of "
                "ptp_lightning.data.Chat to the column of the tools, or to null"
            )
        return found

    def _formatted(
        self, messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
    ) -> list[_Formatted]:
        """The formatted texts, with the character ranges of the assistant's messages to learn.

        Templates differ in the forms of content that they take, and drop or misprint other forms silently. So the
        forms that mean the same are tried until the text contains all that is learned.
        """
        errors: list[BadRowError] = []
        for variant in _equivalent(messages):
            try:
                texts = self._texts(variant, tools, tokenizer)
                for text in texts:
                    _require_written(text, tools)
                return texts
            except BadRowError as error:
                errors.append(error)
        raise errors[0]

    def _texts(
        self, messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
    ) -> list[_Formatted]:
        """See `_formatted`; of one form of the messages."""

        def rendered(number: int, *, add_generation_prompt: bool = False) -> str:
            part = messages[:number]
            try:
                return render_chat(
                    tokenizer, part, tools=tools, template=self.template, add_generation_prompt=add_generation_prompt
                )
            except ValueError as error:
                raise BadRowError(str(error)) from error

        remaining = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        # What the template writes before an answer that is generated, and with it.
        before = {number: rendered(number, add_generation_prompt=True) if number else "" for number in remaining}
        after = {number: rendered(number + 1) for number in remaining}
        texts: list[_Formatted] = []
        end = len(messages)
        while remaining or not texts:
            text = rendered(end)
            # An answer's range is what it adds to the text of the messages before it: templates need no markers.
            spans = {
                number: (len(before[number]), len(after[number]))
                for number in remaining
                if text.startswith(before[number]) and text.startswith(after[number])
            }
            if spans or not remaining:
                texts.append(_Formatted(text, messages[:end], spans))
            elif end == remaining[-1] + 1:
                raise BadRowError(
                    "expected a chat template that appends each message to the previous ones, found that message "
                    f"{end} changes them: set template of ptp_lightning.data.Chat"
                )
            remaining = [number for number in remaining if number not in spans]
            end = remaining[-1] + 1 if remaining else 0
        return texts[::-1]


class _Formatted(NamedTuple):
    """A conversation as text.

    Attributes:
        text: the text.
        messages: of the conversation.
        spans: ranges of the messages to learn, by their index.
    """

    text: str
    messages: list[Message]
    spans: dict[int, Span]


def _tokenized(formatted: _Formatted, tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
    """Tokens of a conversation, and the end of the text, which is learned after an answer."""
    text, messages, spans = formatted
    require_unicode(text)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    is_completion = [
        any(begin <= start < end for begin, end in spans.values()) for start, _ in encoded["offset_mapping"]
    ]
    closing = end_of_text(tokenizer)
    if closing and ids[-1:] == closing:
        closing = []
    return TokenDocument(ids + closing, is_completion + [messages[-1]["role"] == "assistant"] * len(closing))


def _parsed_json(text: str) -> Any:
    """The value of a JSON text; the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _parsed_calls(calls: object) -> list[dict[str, Any]]:
    """Tool calls; data sets store them as JSON, too, because their keys differ from row to row."""
    found = _parsed_json(calls) if isinstance(calls, str) else calls
    if not isinstance(found, list):
        raise BadRowError(f"expected a list of objects in tool_calls, found {calls!r:.80}")
    return [_parsed_call(call) for call in found]


def _parsed_call(call: object) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates expect; OpenAI's format stores them as JSON."""
    if not isinstance(call, Mapping):
        raise BadRowError(f"expected objects in tool_calls and function_call, found {call!r:.80}")
    if isinstance(inner := call.get("function"), Mapping):
        return {**call, "function": _parsed_call(inner)}
    if isinstance(arguments := call.get("arguments"), str) and isinstance(value := _parsed_json(arguments), dict):
        return {**call, "arguments": value}
    return dict(call)


def _text_part(part: object) -> dict[str, str]:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise BadRowError(f"expected parts of text in a list of content, {{type: text, text: ..}}, found {part!r:.80}")


def _equivalent(messages: list[Message]) -> Iterator[list[Message]]:
    """Messages in forms that mean the same, those as given first."""
    tried: list[list[Message]] = []
    for as_form, as_empty in itertools.product((_as_given, _as_text, _as_parts), (_as_given, _other_empty_content)):
        variant = [as_empty(as_form(message)) for message in messages]
        if variant not in tried:
            tried.append(variant)
            yield variant


def _as_given(message: Message) -> Message:
    return message


def _as_text(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": _text_of(content)} if isinstance(content, list) else message


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _other_empty_content(message: Message) -> Message:
    """No content for an empty text and the reverse, in a message with other content."""
    if not OTHER_CONTENT & message.keys() or _text_of(message.get("content")):
        return message
    others = {key: value for key, value in message.items() if key != "content"}
    return others if "content" in message else others | {"content": ""}


def _text_of(content: str | Sequence[Mapping[str, str]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def _require_written(formatted: _Formatted, tools: list[Any] | None) -> None:
    """Reject a text in which the template did not write what is learned, or misprinted it.

    Templates may leave parts of a text out, such as an earlier reasoning, so only the last word of a text is required.

    Raises:
        BadRowError: names what is missing.
    """
    remedy = "found that it does not: set template of ptp_lightning.data.Chat"
    text, messages, spans = formatted
    for number, message in enumerate(messages):
        begin, end = spans.get(number, (0, len(text)))
        written, content = text[begin:end], message.get("content")
        parts = content if isinstance(content, list) else []
        learned = [_text_of(content)] if message["role"] == "assistant" else []
        if not all(part.split()[-1] in written for part in [*learned, *(one["text"] for one in parts)] if part.split()):
            raise BadRowError(f"expected a chat template that writes the content {content!r:.80}, {remedy}")
        if parts and (str(parts)[:10] in text or json.dumps(parts)[:10] in text):
            raise BadRowError(f"expected a chat template that takes content as a list of parts, {remedy}")
        thoughts = {key: found for key in REASONING if isinstance(found := message.get(key), str) and found.split()}
        if number in spans and thoughts and not any(one.split()[-1] in written for one in thoughts.values()):
            raise BadRowError(
                f"expected a chat template that writes {few(thoughts)}, {remedy}, or its reasoning to false"
            )
        calls = [*message.get("tool_calls", []), *([call] if (call := message.get("function_call")) else [])]
        if missing := [name for call in calls if (name := _name(call)) not in written]:
            raise BadRowError(f"expected a chat template that writes the call of tool {missing[0]!r:.80}, {remedy}")
    if missing := [name for tool in tools or [] if (name := _name(tool)) not in text]:
        raise BadRowError(
            f"expected a chat template that writes the tool {missing[0]!r:.80}, {remedy}, or its tools to null"
        )


def _name(tool: Mapping[str, Any]) -> str:
    """The name of a tool or of the tool of a call; empty if there is none."""
    function = tool.get("function")
    return str((cast("Mapping[str, Any]", function) if isinstance(function, Mapping) else tool).get("name", ""))
