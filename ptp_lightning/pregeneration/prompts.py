"""Prompts: where in training documents the teacher is to go on."""

from __future__ import annotations

import warnings

from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.text_datamodule import TextDataModule


def find_prompts(data: TextDataModule, num_prompts: int | None, prompt_tokens: int, longest: int) -> list[list[int]]:
    """What stands before that which is learned in training documents; where all is learned, their first tokens.

    Args:
        data: whose documents; set up.
        num_prompts: P; None takes all documents.
        prompt_tokens: of a document all of which is learned, so many tokens at most.
        longest: prompts that the documents themselves have are left out if they have more tokens: cut, they would ask
            something else.

    Raises:
        ValueError: there are fewer prompts.
    """
    found: list[list[int]] = []
    num_too_long = 0
    for document in data.training_documents(num_prompts):
        is_learned = list(document.completion_mask)
        if True not in is_learned:  # nothing is to be said after it
            continue
        own = list(document.token_ids[: is_learned.index(True)])
        prompt = own or _beginning(document, prompt_tokens, data.end_of_text)
        num_too_long += len(own) > longest
        if prompt and len(own) <= longest:
            found.append(prompt)
        if len(found) == num_prompts:
            break
    if not found or len(found) < (num_prompts or 0):
        left_out = f" and {num_too_long} of more than {longest} tokens" if num_too_long else ""
        raise ValueError(
            f"expected {num_prompts or 'some'} prompts in the training documents of data, found {len(found)}"
            f"{left_out}: lower --num_prompts{' or raise --prompt_tokens' if left_out else ''}, or set data"
        )
    if num_too_long:
        warnings.warn(
            f"left out {num_too_long} prompts of more than {longest} tokens, behind which no completion of "
            "--max_new_tokens fits into a row; raise data.row_length or --prompt_tokens to keep them",
            stacklevel=2,
        )
    return found


def _beginning(document: TokenDocument, num_tokens: int, end_of_text: int | None) -> list[int]:
    """Without the end, behind which nothing can follow."""
    token_ids = document.token_ids[:-1] if document.token_ids[-1] == end_of_text else document.token_ids
    return list(token_ids[:num_tokens])
