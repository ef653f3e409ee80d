"""The text of a document, divided into what is learned and what is not."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.rendering import Rendering
from tests.helpers.byte_tokenizer import END_OF_TEXT_ID


def split(rendering: Rendering, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text with what is not learned, and what is learned, hidden by dots."""
    return split_document(rendering.document(row, tokenizer), tokenizer)


def split_document(document: TokenDocument, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """As `split`, of a document."""
    ids, learned = document.token_ids, document.completion_mask
    symbols = ["$" if token == END_OF_TEXT_ID else str(tokenizer.decode([token])) for token in ids]
    assert len(learned) == len(symbols)
    return (
        "".join(symbol if flag else "." for symbol, flag in zip(symbols, learned, strict=True)),
        "".join("." if flag else symbol for symbol, flag in zip(symbols, learned, strict=True)),
    )
