"""From a conversation to the tokens that the model continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN_TURNS = "\n\n"


class Prompt(NamedTuple):
    """Tokens to continue.

    Attributes:
        token_ids: at most as many as there is room for, the latest ones.
        num_cut: how many were left out at the beginning.
    """

    token_ids: list[int]
    num_cut: int


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, history: Sequence[tuple[str, str]], turn: str, room: int | None
) -> Prompt:
    """What is said so far, in the tokenizer's chat template, or one after another where it has none.

    Args:
        tokenizer: of the model.
        history: earlier turns, with their answers.
        turn: to be answered now.
        room: the most tokens that fit in; None for no limit.
    """
    if tokenizer.chat_template is not None:
        messages = [
            {"role": role, "content": content}
            for pair in history
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        token_ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # pyright: ignore[reportArgumentType]
    else:
        said = [part for pair in history for part in pair]
        token_ids = tokenizer.encode(BETWEEN_TURNS.join([*said, turn]), verbose=False)
    num_cut = 0 if room is None else max(0, len(token_ids) - room)
    return Prompt(token_ids[num_cut:], num_cut)
