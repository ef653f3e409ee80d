"""Rows of a stream from which nothing can be learned: they are counted, and a stream of nothing else ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from ptp_lightning.data.streaming.blocks import Block

OnError = Literal["raise", "skip"]
MAX_EMPTY_BLOCKS = 1000  # consecutive blocks without anything to learn, after which an error is raised
NOT_LEARNED = "nothing is learned, because they hold no completion, such as a message of an assistant"


def require_rows(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks; raise an error after `MAX_EMPTY_BLOCKS` consecutive blocks without rows."""
    empty = num_too_short = num_not_learned = num_invalid = 0
    last_error = ""
    for block in blocks:
        yield block
        if len(block.rows.input_ids):
            empty = num_too_short = num_not_learned = num_invalid = 0
            continue
        empty += 1
        num_too_short += block.num_too_short
        num_not_learned += block.num_not_learned
        num_invalid += len(block.row_errors)
        last_error = f" (the last one: {block.row_errors[-1]})" if block.row_errors else last_error
        if empty > MAX_EMPTY_BLOCKS:
            raise ValueError(
                f"expected documents with something to learn, found none in {empty} blocks, but {num_too_short} "
                f"documents of fewer than two tokens, {num_not_learned} from which {NOT_LEARNED}, and {num_invalid} "
                f"invalid rows{last_error}: set data.parts"
            )


def count_invalid(before: int, row_errors: Sequence[str], on_error: OnError) -> int:
    """Add the number of invalid rows; warn at each power of ten, or raise an error for the first."""
    if row_errors and on_error == "raise":
        raise ValueError(f"{row_errors[0]}; set data.on_error: skip to skip such rows")
    now = before + len(row_errors)
    if row_errors and is_new_magnitude(before, now):
        warnings.warn(
            f"skipped {now} invalid rows so far (data.on_error: skip), the last one: {row_errors[-1]}", stacklevel=3
        )
    return now


def count_not_learned(before: int, block: Block) -> int:
    """Add the number of documents from which nothing is learned; warn at each power of ten."""
    now = before + block.num_not_learned
    if block.num_not_learned and is_new_magnitude(before, now):
        warnings.warn(
            f"{now} documents so far from which {NOT_LEARNED}: set the rendering in data.parts, for ptp_lightning.data."
            "Chat its roles",
            stacklevel=3,
        )
    return now


def is_new_magnitude(before: int, now: int) -> bool:
    """Whether a count has reached another power of ten."""
    return len(str(now)) > len(str(before)) or before == 0
