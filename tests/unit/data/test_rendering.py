"""Renderings: which tokens a row becomes, and which of them are learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ptp_lightning.data.chat import Chat
from ptp_lightning.data.rendering import PlainText, PromptAndCompletion, Rendering, value_at
from ptp_lightning.data.streaming.row_source import BadRowError
from ptp_lightning.testing import check_rendering
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.chat_tokenizer import TEMPLATE
from tests.helpers.learned_text import split

CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


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


@pytest.mark.parametrize(
    ("rendering", "row"),
    [
        (PlainText("content"), {"content": "ab"}),
        (PromptAndCompletion("Q {question} ", "{answer}"), {"question": "why", "answer": "so"}),
        (
            Chat(template=TEMPLATE),
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_contract(rendering: Rendering, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    check_rendering(rendering, [row], tokenizer)


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
        for rendering in (PlainText(), PromptAndCompletion("{text}", "b"), Chat(template="{{ messages[0].content }}")):
            with pytest.raises(BadRowError, match="expected Unicode text"):
                rendering.document(row, tokenizer)

    def test_a_value_that_is_not_text_is_rejected(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(BadRowError, match="expected text in column 'text', found int"):
            PlainText().document({"text": 3}, tokenizer)
