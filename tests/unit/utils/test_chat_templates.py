"""Chat templates: prompts, openings and ends of turns, and one line for what a template refuses."""

import pytest

from ptp_lightning.utils.chat_templates import (
    chat_prompt,
    end_of_turn_ids,
    render_chat,
    require_chat_template,
    user_message,
    user_turn_opening,
)
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.chat_tokenizer import DEFAULT_SYSTEM, END_OF_TURN_ID, chat, chat_tokenizer

PLAIN = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}"
NO_SYSTEM = "{{ raise_exception('System role\n not supported') }}"


@pytest.mark.parametrize(("system", "expected"), [(None, DEFAULT_SYSTEM), ("Count.", "Count."), ("", "")])
def test_a_prompt_is_what_the_template_writes(system: str | None, expected: str) -> None:
    tokenizer = chat_tokenizer()
    token_ids = chat_prompt(tokenizer, user_message("1 + 1?", system))
    assert tokenizer.decode(token_ids) == chat("1 + 1?", expected)
    assert token_ids.count(END_OF_TURN_ID) == 2  # one token each, not bytes


def test_the_opening_of_a_user_turn() -> None:
    opening = user_turn_opening(chat_tokenizer(), "Count.")
    assert chat("1 + 1?", "Count.").startswith(opening + "1 + 1?")


def test_the_special_token_after_an_answer_ends_a_turn() -> None:
    assert end_of_turn_ids(chat_tokenizer()) == {END_OF_TURN_ID}


def test_a_template_of_plain_text_has_no_end_of_turn() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    assert end_of_turn_ids(tokenizer) == frozenset()
    assert user_turn_opening(tokenizer) == "### user\n"


def test_errors_are_one_line() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"^expected a tokenizer with a chat template for --chat, found [^\n]*$"):
        require_chat_template(tokenizer, "--chat")
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(ValueError, match=r"^the chat template rejects a conversation: System role not supported$"):
        render_chat(tokenizer, user_message("x", "y"))
    tokenizer.chat_template = "{{ messages[0].role }}"
    with pytest.raises(ValueError, match=r"^expected a chat template that contains each message, found [^\n]*$"):
        user_turn_opening(tokenizer)
