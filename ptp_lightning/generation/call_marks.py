"""A text divided by the calls that wrote it, with the wrong drafts of each, in colours or in plain marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ptp_lightning.decoding.generation import Generation
from ptp_lightning.decoding.text import IncrementalDetokenizer

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

SHADES = ("#a6dcef", "#f9e2a2", "#c5e8b7")
"""Background colours of consecutive cycles, in turn."""
REJECTED_STYLE = "strike #d0554f"
LEGEND = (
    "each shade, or the text between two bars, is one cycle of draft and verification; struck out: its wrong drafts"
)


class MarkedCycle(NamedTuple):
    """The text of a cycle.

    Attributes:
        text: of the committed tokens, in whole characters; a character is part of the cycle that completes it.
        rejected: text of the wrong drafts in one line, with line breaks as ``\\n``.
        num_tokens: committed tokens.
        num_calls: forward passes.
    """

    text: str
    rejected: str
    num_tokens: int
    num_calls: int


def mark_cycles(
    generation: Generation, prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[MarkedCycle]:
    """Divide a continuation; the texts of all cycles add up to it.

    Args:
        generation: the continuation.
        prompt_ids: tokens of its prompt.
        tokenizer: of the base model.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, list(prompt_ids))
    marked: list[MarkedCycle] = []
    begin = length = 0
    for cycle in generation.cycles:
        end = begin + cycle.num_committed
        correct = max(cycle.num_committed - 1, 0) if cycle.rejected else cycle.num_committed
        text = detokenizer.push(generation.token_ids[begin : begin + correct])
        rejected = _in_one_line(detokenizer.peek(cycle.rejected)) if cycle.rejected else ""
        text += detokenizer.push(generation.token_ids[begin + correct : end])
        if end == generation.num_tokens:
            text += detokenizer.flush()
        text = text[: len(generation.text) - length]  # a stop string is not part of it
        marked.append(MarkedCycle(text, rejected, cycle.num_committed, cycle.num_calls))
        begin, length = end, length + len(text)
    return marked


def plain_marks(cycles: Sequence[MarkedCycle]) -> str:
    """The text with a bar after each cycle, and wrong drafts between tildes.

    >>> plain_marks([MarkedCycle("a + b", " * c", 3, 2), MarkedCycle(" == 3", "", 2, 2)])
    'a + b~~ * c~~| == 3|'
    """
    return "".join(f"{cycle.text}{f'~~{cycle.rejected}~~' if cycle.rejected else ''}|" for cycle in cycles)


def coloured(cycles: Sequence[MarkedCycle]) -> Text:
    """The text with a background for each cycle, and wrong drafts struck out."""
    from rich.text import Text

    text = Text()
    for number, cycle in enumerate(cycles):
        text.append(cycle.text, f"black on {SHADES[number % len(SHADES)]}")  # legible on dark terminals, too
        text.append(cycle.rejected, REJECTED_STYLE)
    return text


def print_marked(before: str, cycles: Sequence[MarkedCycle]) -> None:
    """Print a prompt and its continuation: in colours on a terminal; elsewhere, or with NO_COLOR, in plain marks."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal and not console.no_color:
        console.print(before, end="", markup=False, emoji=False)
        console.print(coloured(cycles))
    else:
        print(f"{before}|{plain_marks(cycles)}")


def _in_one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
