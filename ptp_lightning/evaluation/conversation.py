"""Prompts: the tokens of a conversation, for the model to continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ptp_lightning.utils.chat_templates import chat_prompt, user_message
from ptp_lightning.utils.text_tokens import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"


class Prompt(NamedTuple):
    """Tokens to continue.

    Attributes:
        token_ids: the last tokens that fit.
        num_truncated: number of tokens removed from the start.
    """

    token_ids: list[int]
    num_truncated: int


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, history: Sequence[tuple[str, str]], turn: str, max_tokens: int | None
) -> Prompt:
    """The conversation in the tokenizer's chat template, or joined by blank lines if it has none.

    Args:
        tokenizer: of the model.
        history: earlier turns with their answers.
        turn: the message to answer.
        max_tokens: longest prompt; None for no limit.
    """
    if tokenizer.chat_template is not None:
        messages = [
            {"role": role, "content": content}
            for pair in history
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        token_ids = chat_prompt(tokenizer, [*messages, *user_message(turn)])
    else:
        earlier = [part for pair in history for part in pair]
        token_ids = text_ids(tokenizer, SEPARATOR.join([*earlier, turn]))
    num_truncated = 0 if max_tokens is None else max(0, len(token_ids) - max_tokens)
    return Prompt(token_ids[num_truncated:], num_truncated)
