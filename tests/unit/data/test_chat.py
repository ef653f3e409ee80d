"""Chat: which tokens a conversation becomes, and which of them are learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ptp_lightning.data.chat import Chat
from ptp_lightning.data.streaming.row_source import BadRowError
from tests.helpers.byte_tokenizer import END_OF_TEXT_ID, byte_tokenizer
from tests.helpers.learned_text import split, split_document

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


WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
WRITE_CALLS = (
    "{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
)
GENERATION_PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
# How templates write messages: with what there is, with calls in place of content, with content first, of parts alone.
WHAT_THERE_IS = (
    "{% if tools %}<tools>{{ tools | tojson }}</>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}" + WRITE_CALLS + "</>{% endfor %}" + GENERATION_PROMPT
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is not defined %}"
    + WRITE_CALLS
    + "{% else %}{{ m.content }}{% endif %}</>{% endfor %}"
    + GENERATION_PROMPT
)
CONTENT_FIRST = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + WRITE_CALLS + "</>{% endfor %}" + GENERATION_PROMPT
)
PARTS_ALONE = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}</>{% endfor %}"
    + GENERATION_PROMPT
)
JOINED_BY_PLUS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}</>{% endfor %}" + GENERATION_PROMPT


def answer(**entries: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi?"}, {"role": "assistant", **entries}]


def learned_of(chat: Chat, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    return split(chat, row, tokenizer)[0].strip(".")


class TestToolCalls:
    @pytest.mark.parametrize("template", [WHAT_THERE_IS, EITHER, CONTENT_FIRST])
    @pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}], ids=["empty", "null", "missing"])
    def test_a_call_is_learned(
        self, template: str, content: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        row = {"messages": answer(tool_calls=[WEATHER], **content)}
        assert learned_of(Chat(template=template), row, tokenizer) == '[weather {"city": "Bern"}]</>$'

    def test_arguments_as_json(self, tokenizer: PreTrainedTokenizerBase) -> None:
        call = {"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
        row = {"messages": answer(content=None, tool_calls=[call])}
        assert learned_of(Chat(template=WHAT_THERE_IS), row, tokenizer) == '[weather {"city": "Bern"}]</>$'

    def test_a_template_that_drops_calls_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="", tool_calls=[WEATHER])}
        with pytest.raises(BadRowError, match=r"writes the call of tool 'weather'.*set template"):
            Chat(template=TEMPLATE).document(row, tokenizer)

    def test_nulls_of_columnar_files_are_no_entries(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ 'tool_calls' in m }}</>{% endfor %}"
        for empty in (None, []):
            row = {"messages": answer(content="Yo.", tool_calls=empty)[1:]}
            assert "Yo.False" in learned_of(Chat(template=template), row, tokenizer)

    def test_a_call_that_is_no_object_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(BadRowError, match="objects in tool_calls"):
            Chat(template=WHAT_THERE_IS).document({"messages": answer(content="", tool_calls=["weather"])}, tokenizer)

    def test_calls_as_json(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content=None, tool_calls=json.dumps([WEATHER]))}
        assert learned_of(Chat(template=WHAT_THERE_IS), row, tokenizer) == '[weather {"city": "Bern"}]</>$'

    @pytest.mark.parametrize("calls", [5, True, "weather", WEATHER])
    def test_calls_that_are_no_list_are_refused(self, calls: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(BadRowError, match="a list of objects in tool_calls"):
            Chat(template=WHAT_THERE_IS).document({"messages": answer(content="", tool_calls=calls)}, tokenizer)

    @pytest.mark.parametrize("content", [{"content": ""}, {"content": None}], ids=["empty", "null"])
    def test_a_template_that_drops_a_function_call_is_refused(
        self, content: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Without its call, such a message is the end of a turn alone."""
        row = {"messages": answer(function_call=WEATHER["function"], **content)}
        with pytest.raises(BadRowError, match=r"writes the call of tool 'weather'.*set template"):
            Chat(template=WHAT_THERE_IS).document(row, tokenizer)

    def test_a_function_call_is_learned(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.function_call.name }}</>{% endfor %}"
        row = {"messages": [{"role": "assistant", "content": None, "function_call": WEATHER["function"]}]}
        assert learned_of(Chat(template=template), row, tokenizer).endswith("weather</>$")


class TestTools:
    @pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "json"])
    def test_reach_the_template(self, tools: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="Yo."), "tools": tools}
        learned, hidden = split(Chat(template=WHAT_THERE_IS), row, tokenizer)
        assert hidden.startswith("<tools>[{") and "weather" in hidden and learned.strip(".") == "Yo.</>$"

    @pytest.mark.parametrize("tools", [None, [], "[]", ""])
    def test_none(self, tools: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="Yo."), "tools": tools}
        assert split(Chat(template=WHAT_THERE_IS), row, tokenizer)[1].startswith("<user>")

    def test_a_template_without_tools_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="Yo."), "tools": [TOOL]}
        with pytest.raises(BadRowError, match=r"writes the tool 'weather'.*its tools to null"):
            Chat(template=TEMPLATE).document(row, tokenizer)
        assert learned_of(Chat(template=TEMPLATE, tools=None), row, tokenizer) == "Yo.</>$"

    def test_another_form_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="Yo."), "tools": "a hammer"}
        with pytest.raises(BadRowError, match=r"JSON schemas in column 'tools'.*set tools of"):
            Chat(template=WHAT_THERE_IS).document(row, tokenizer)


class TestContent:
    @pytest.mark.parametrize("template", [WHAT_THERE_IS, CONTENT_FIRST, PARTS_ALONE, JOINED_BY_PLUS])
    def test_text_and_parts_of_text(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        chat = Chat(template=template)
        parts = [{"type": "text", "text": "Yo, "}, {"type": "text", "text": "you."}]
        for content in ("Yo, you.", parts):
            assert learned_of(chat, {"messages": answer(content=content)}, tokenizer) == "Yo, you.</>$"
        question = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
        assert split(chat, {"messages": question}, tokenizer)[1].startswith("<user>Yo, you.</><assistant>.")

    def test_a_part_that_is_no_text_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content=[{"type": "image", "url": "a.png"}])}
        with pytest.raises(BadRowError, match="expected parts of text"):
            Chat(template=WHAT_THERE_IS).document(row, tokenizer)

    def test_reasoning(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for content in ({"content": "Yo."}, {"content": None}, {}):
            row = {"messages": answer(reasoning_content="hm", **content)}
            written = content.get("content") or ""
            assert learned_of(Chat(template=WHAT_THERE_IS), row, tokenizer) == f"(hm){written}</>$"

    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_a_template_that_drops_reasoning_is_refused(self, key: str, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="Yo.", **{key: "I think so."})}
        with pytest.raises(BadRowError, match=f"writes {key}.*set template of .*, or its reasoning to false"):
            Chat(template=CONTENT_FIRST).document(row, tokenizer)
        assert learned_of(Chat(template=CONTENT_FIRST, reasoning=False), row, tokenizer) == "Yo.</>$"
        assert learned_of(Chat(template=WHAT_THERE_IS, reasoning=False), row, tokenizer) == "Yo.</>$"

    def test_empty_reasoning_is_none(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": answer(content="Yo.", reasoning_content=" ", thinking=None)}
        assert learned_of(Chat(template=CONTENT_FIRST), row, tokenizer) == "Yo.</>$"

    def test_a_template_that_drops_the_content_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = "{% for m in messages %}<{{ m.role }}></>{% endfor %}" + GENERATION_PROMPT
        with pytest.raises(BadRowError, match=r"writes the content 'Yo\.'"):
            Chat(template=template).document({"messages": answer(content="Yo.")}, tokenizer)


# As Qwen3's: reasoning is written after the last question alone.
LAST_REASONING = (
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.index0 > last.question %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}</>{% endfor %}" + GENERATION_PROMPT
)


class TestTemplatesThatChangeEarlierMessages:
    def messages(self, roles: str) -> list[dict[str, str]]:
        """A message of each role (its first letter), with its number as content, and ten times that as reasoning."""
        names = {"u": "user", "a": "assistant", "t": "tool"}
        return [
            {"role": names[role], "content": str(number), "reasoning_content": str(10 * number)}
            for number, role in enumerate(roles, start=1)
        ]

    def documents(self, roles: str, tokenizer: PreTrainedTokenizerBase, template: str = LAST_REASONING) -> list[str]:
        """What is learned of each document in brackets, after what is not."""
        found = Chat(template=template).documents({"messages": self.messages(roles)}, tokenizer)
        texts = [split_document(document, tokenizer) for document in found]
        return [f"{hidden.strip('.')} [{learned.strip('.')}]" for learned, hidden in texts]

    def test_each_answer_is_learned_as_it_is_generated(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert self.documents("uaua", tokenizer) == [
            "<user>1</><assistant> [(20)2</>$]",
            "<user>1</><assistant>2</><user>3</><assistant> [(40)4</>$]",
        ]

    def test_answers_to_one_question_stay_together(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """A call of a tool and the answer after it."""
        first, second = self.documents("uataua", tokenizer)
        assert first.replace(".", "") == "<user>1</><assistant><tool>3</><assistant> [(20)2</>(40)4</>$]"
        assert second == "<user>1</><assistant>2</><tool>3</><assistant>4</><user>5</><assistant> [(60)6</>$]"

    def test_a_last_question_is_left_out(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert self.documents("uau", tokenizer) == self.documents("ua", tokenizer)

    def test_other_templates_make_one_document(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for roles in ("ua", "uaua", "uau"):
            assert len(self.documents(roles, tokenizer, template=WHAT_THERE_IS)) == 1

    def test_several_documents_are_not_one(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(BadRowError, match="as one document, found 2"):
            Chat(template=LAST_REASONING).document({"messages": self.messages("uaua")}, tokenizer)


class TestSpeakers:
    @pytest.mark.parametrize("speaker", ["gpt", "GPT", "Assistant", "bing", "bard", "chatgpt", "model", "bot"])
    def test_names_of_assistants(self, speaker: str, tokenizer: PreTrainedTokenizerBase) -> None:
        row = {"messages": [{"from": "Human", "value": "Hi?"}, {"from": speaker, "value": "Yo."}]}
        learned, hidden = split(Chat(role="from", content="value", template=TEMPLATE), row, tokenizer)
        assert hidden.startswith("<user>Hi?</><assistant>.") and learned.strip(".") == "Yo.</>$"

    def test_an_unknown_one_is_asked_for_by_name(self, tokenizer: PreTrainedTokenizerBase) -> None:
        messages = [{"role": "user", "content": "Hi?"}, {"role": "oracle", "content": "Yo."}]
        with pytest.raises(BadRowError, match=r"found 'oracle': set roles of ptp_lightning.data.Chat"):
            Chat(template=TEMPLATE).document({"messages": messages}, tokenizer)
        chat = Chat(template=TEMPLATE, roles={"oracle": "narrator"})
        assert "<narrator>Yo." in split(chat, {"messages": messages}, tokenizer)[1]
