"""Prompts for a teacher, taken from training documents."""

from __future__ import annotations

import warnings

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.text_datamodule import TextDataModule


def find_prompts(data: TextDataModule, num_prompts: int | None, prompt_tokens: int, max_length: int) -> list[list[int]]:
    """The prompts of training documents; for documents without a prompt, their first tokens.

    Args:
        data: source of the documents; `setup` was called.
        num_prompts: P; None uses all documents.
        prompt_tokens: number of tokens taken from a document without a prompt.
        max_length: a document's own prompt is skipped if it is longer, because a truncated prompt would have another
            meaning.

    Raises:
        ValueError: there are fewer prompts.
    """
    found: list[list[int]] = []
    num_too_long = 0
    for document in data.training_documents(num_prompts):
        completion_mask = list(document.completion_mask)
        if True not in completion_mask:
            continue
        own = list(document.token_ids[: completion_mask.index(True)])
        prompt = own or _first_tokens(document, prompt_tokens, data.end_of_text)
        num_too_long += len(own) > max_length
        if prompt and len(own) <= max_length:
            found.append(prompt)
        if len(found) == num_prompts:
            break
    if not found or len(found) < (num_prompts or 0):
        skipped = f" and {num_too_long} of more than {max_length} tokens" if num_too_long else ""
        raise ValueError(
            f"expected {num_prompts or 'some'} prompts in the training documents of data, found {len(found)}"
            f"{skipped}: lower --num_prompts{' or raise --prompt_tokens' if skipped else ''}, or set data"
        )
    if num_too_long:
        warnings.warn(
            f"skipped {num_too_long} prompts of more than {max_length} tokens, after which no completion of "
            "--max_new_tokens fits into a row; raise data.row_length or --prompt_tokens to use them",
            stacklevel=2,
        )
    return found


def _first_tokens(document: TokenDocument, num_tokens: int, end_of_text: int | None) -> list[int]:
    """The first tokens without the end-of-text token."""
    token_ids = document.token_ids[:-1] if document.token_ids[-1] == end_of_text else document.token_ids
    return list(token_ids[:num_tokens])
