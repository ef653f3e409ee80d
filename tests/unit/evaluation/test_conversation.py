"""Prompts: by a chat template or joined, and truncated at the start."""

from ptp_lightning.evaluation.conversation import make_prompt
from tests.helpers.byte_tokenizer import byte_tokenizer

HISTORY = [("a?", "b."), ("c?", "d.")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_without_a_template_turns_and_answers_are_joined() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(make_prompt(tokenizer, HISTORY, "e?", None).token_ids) == "a?\n\nb.\n\nc?\n\nd.\n\ne?"
    assert tokenizer.decode(make_prompt(tokenizer, [], "def f(\n", None).token_ids) == "def f(\n"


def test_with_a_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.decode(make_prompt(tokenizer, HISTORY, "e?", None).token_ids)
    assert text == "<user>a?<assistant>b.<user>c?<assistant>d.<user>e?<assistant>"


def test_the_last_tokens_are_kept() -> None:
    tokenizer = byte_tokenizer()
    prompt = make_prompt(tokenizer, [], "abcdef", max_tokens=4)
    assert (tokenizer.decode(prompt.token_ids), prompt.num_truncated) == ("cdef", 2)
    assert make_prompt(tokenizer, [], "abcd", max_tokens=4).num_truncated == 0
