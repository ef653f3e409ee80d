"""Chat templates of tokenizers: conversations as text or token ids, and where a turn begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ptp_lightning.utils.text_tokens import ids_as_written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""`role` (system, user, assistant, tool), `content`, and what else the template takes, `tool_calls` for instance."""

PLACEHOLDER = "placeholder"  # of a message, to find where the template puts it


def require_chat_template(tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Refuse a tokenizer without a chat template.

    Args:
        tokenizer: of the base model.
        option: that needs the template.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"expected a tokenizer with a chat template for {option}, found that of "
            f"{tokenizer.name_or_path or 'the base model'} without: leave {option} out, or use a chat model"
        )


def example_options(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Options of the command `generate` for a first look at a model: a chat, if its tokenizer has a template.

    >>> example_options(None)
    '--prompt "def "'
    """
    if tokenizer is None or tokenizer.chat_template is None:
        return '--prompt "def "'
    return '--chat --prompt "What is a prime number?"'


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as text.

    Args:
        tokenizer: whose template is used.
        messages: the conversation.
        tools: JSON schemas of the tools that the assistant may call.
        template: Jinja template to use instead.
        add_generation_prompt: whether the text ends with the opening of an answer.

    Raises:
        ValueError: the template refuses the conversation.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # templates may raise anything, for example for an unknown role
        raise ValueError(f"the chat template rejects a conversation: {' '.join(str(error).split())}") from error
    return text


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to the opening of an answer.

    The template writes all special tokens, so the tokenizer adds none. Raises as `render_chat`.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return ids_as_written(tokenizer, text)


def user_message(text: str, system: str | None = None) -> list[Message]:
    """A conversation that begins with a user's turn.

    >>> user_message("Hello", system="Be brief.")
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello'}]
    """
    instructions = [] if system is None else [{"role": "system", "content": system}]
    return [*instructions, {"role": "user", "content": text}]


def user_turn_opening(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> str:
    """What the template writes before the text of a user's first turn.

    Raises:
        ValueError: the template refuses the conversation, or does not contain its text.
    """
    return _around_placeholder(tokenizer, user_message(PLACEHOLDER, system))[0]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special token that the template writes after an answer; empty if it ends answers with plain text.

    Raises:
        ValueError: as `user_turn_opening`.
    """
    conversation = [*user_message("Hello"), {"role": "assistant", "content": PLACEHOLDER}]
    _, closing = _around_placeholder(tokenizer, conversation)
    first = ids_as_written(tokenizer, closing)[:1]
    return frozenset(first) & special_ids(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are not text, those without a role included."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids).union(added)


def _around_placeholder(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, str]:
    text = render_chat(tokenizer, messages)
    before, found, after = text.rpartition(PLACEHOLDER)
    if not found:
        raise ValueError(f"expected a chat template that contains each message, found the conversation {text!r:.80}")
    return before, after
