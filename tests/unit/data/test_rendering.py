"""Renderings: which tokens a row becomes, and which of them are learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ptp_lightning.data.rendering import Chat, PlainText, PromptAndCompletion, Rendering, value_at
from ptp_lightning.data.streaming.row_source import BadRowError
from tests.helpers.byte_tokenizer import END_OF_TEXT_ID, byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yo."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def split(rendering: Rendering, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text with what is not learned, and what is learned, hidden by dots."""
    document = rendering.document(row, tokenizer)
    ids, learned = document.token_ids, document.completion_mask
    symbols = ["$" if token == END_OF_TEXT_ID else tokenizer.decode([token]) for token in ids]
    assert len(learned) == len(symbols)
    return (
        "".join(symbol if flag else "." for symbol, flag in zip(symbols, learned, strict=True)),
        "".join("." if flag else symbol for symbol, flag in zip(symbols, learned, strict=True)),
    )


class TestPlainText:
    def test_all_is_learned(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert split(PlainText(), {"text": "ab"}, tokenizer) == ("ab$", "...")

    def test_an_empty_text_is_its_end_alone(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert split(PlainText("content"), {"content": ""}, tokenizer) == ("$", ".")


class TestPromptAndCompletion:
    def test_the_completion_is_learned(self, tokenizer: PreTrainedTokenizerBase) -> None:
        rendering = PromptAndCompletion(prompt="Q {question}\n{{A}} ", completion="{answers.0.text}!")
        row = {"question": "why", "answers": [{"text": "so"}, {"text": "no"}]}
        learned, hidden = split(rendering, row, tokenizer)
        assert hidden == "Q why\n{A} ...."
        assert learned == "." * 10 + "so!$"


class TestChat:
    def test_what_the_assistant_says_is_learned(self, tokenizer: PreTrainedTokenizerBase) -> None:
        learned, hidden = split(Chat(template=TEMPLATE), {"messages": CONVERSATION}, tokenizer)
        assert hidden == "<user>Hi?</><assistant>......<user>So?</><assistant>......" + "."
        assert learned.replace(".", "") == "Yo</>No</>$"

    def test_sharegpt(self, tokenizer: PreTrainedTokenizerBase) -> None:
        rendering = Chat("conversations", role="from", content="value", template=TEMPLATE)
        row = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo."}]}
        assert split(rendering, row, tokenizer)[1] == "<user>Hi?</><assistant>......" + "."

    def test_own_names_of_roles(self, tokenizer: PreTrainedTokenizerBase) -> None:
        rendering = Chat(template=TEMPLATE, roles={"oracle": "assistant"})
        row = {"messages": [{"role": "user", "content": "?"}, {"role": "oracle", "content": "42"}]}
        assert split(rendering, row, tokenizer)[1].startswith("<user>?</><assistant>.")

    def test_a_conversation_that_ends_with_the_user_learns_no_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert split(Chat(template=TEMPLATE), {"messages": CONVERSATION[:3]}, tokenizer)[1].endswith("<user>So?</>$")

    def test_a_conversation_that_the_assistant_begins(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert split(Chat(template=TEMPLATE), {"messages": CONVERSATION[1:2]}, tokenizer)[1] == "." * 18

    def test_an_end_that_the_template_writes_is_not_written_twice(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = "{% for message in messages %}{{ message.content }}<|endoftext|>{% endfor %}"
        ids = Chat(template=template).document({"messages": CONVERSATION[:2]}, tokenizer).token_ids
        assert list(ids).count(END_OF_TEXT_ID) == 2 and ids[-1] == END_OF_TEXT_ID

    def test_a_template_that_changes_earlier_messages_is_rejected(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
        with pytest.raises(BadRowError, match="appends each message to"):
            Chat(template=template).document({"messages": CONVERSATION}, tokenizer)

    def test_a_tokenizer_without_a_template_is_rejected(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(ValueError, match="chat template"):
            Chat().require_tokenizer(tokenizer)
        Chat(template=TEMPLATE).require_tokenizer(tokenizer)

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ([], "a list of messages"),
            ("Hi", "a list of messages"),
            ([{"role": "user"}], "'content'"),
            ([{"from": "human", "value": "Hi"}], "set role and content"),
            ([{"role": "user", "content": None}], "'content'"),
        ],
    )
    def test_other_shapes_are_rejected(self, tokenizer: PreTrainedTokenizerBase, messages: Any, reason: str) -> None:
        with pytest.raises(BadRowError, match=reason):
            Chat(template=TEMPLATE).document({"messages": messages}, tokenizer)

    def test_a_template_that_raises_is_quoted(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(BadRowError, match="no such role"):
            Chat(template="{{ raise_exception('no such role') }}").document({"messages": CONVERSATION}, tokenizer)


NESTED = {"a": {"b": [10, {"c": 20}]}}


class TestValueAt:
    @pytest.mark.parametrize(("path", "expected"), [("a.b", 30), ("a.b.0", 10), ("a.b.1.c", 20)])
    def test_finds(self, path: str, expected: int) -> None:
        assert value_at(NESTED | {"a.b": 30} if path == "a.b" else NESTED, path) == expected

    @pytest.mark.parametrize("path", ["x", "a.x", "a.b.2", "a.b.0.c", "a.b.-1"])
    def test_names_what_is_missing(self, path: str) -> None:
        with pytest.raises(BadRowError, match=f"column '{path}'"):
            value_at(NESTED, path)

    def test_an_unpaired_surrogate_is_rejected(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = json.loads(r'{"text": "a\ud800", "messages": [{"role": "assistant", "content": "\udfff"}]}')
        for rendering in (PlainText(), PromptAndCompletion("{text}", "b"), Chat(template=TEMPLATE)):
            with pytest.raises(BadRowError, match="expected Unicode text"):
                rendering.document(row, tokenizer)

    def test_a_value_that_is_not_text_is_rejected(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(BadRowError, match="expected text in column 'text', found int"):
            PlainText().document({"text": 3}, tokenizer)
