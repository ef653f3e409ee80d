"""An adapter on another base model than its own: a fine-tune of it, or the same weights rounded differently.

The text is what this base model would have sampled, because it verifies every token. The adapter may draft worse.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.utils.pretrained import few, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_KEY = "base"
NUM_FINGERPRINT_DIGITS = 12
PROBES = (
    "Hello, world! It's 12:30.",
    "def f(x):\n\treturn x**2 + 1  # 3.14159\n",
    "Übergröße, naïve café, 東京, 🙂",
    "  two  blanks\r\n\n",
    "Steps:\n\n1. One\n\n22. Two,  3\n",
)
"""Texts that tokenizers of one vocabulary may still split in different ways: case, digits, blanks, bytes, accents."""


def require_same_shapes(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], base: str) -> None:
    """Refuse a base model to which stored weights do not fit.

    Args:
        own: trained weights of a network around this base model.
        stored: those of the adapter.
        base: path or id of the base model.

    Raises:
        ValueError: names the first weight that differs.
    """
    for name in sorted(own.keys() | stored.keys()):
        needed, found = (list(state[name].shape) if name in state else None for state in (own, stored))
        if needed != found:
            raise ValueError(
                f"expected a base model of the adapter's architecture and size, found {base}, for which {name} would "
                f"have the shape {needed or 'of nothing'}, not {found or 'of nothing'}: set {BASE_KEY}"
            )


def require_same_tokenizer(trained_with: BackboneSettings, base: BackboneSettings) -> bool:
    """Refuse a base model whose tokenizer has another vocabulary, or splits texts differently.

    Returns:
        Whether the tokenizers were compared; False if that of the adapter's own base model cannot be read.

    Raises:
        ValueError: the tokenizers differ; names how.
        FileNotFoundError: the base model comes without a tokenizer.
    """
    found = load_tokenizer(base.path, revision=base.revision, key=BASE_KEY)
    try:
        expected = load_tokenizer(trained_with.path, revision=trained_with.revision, key=BASE_KEY)
    except (ValueError, OSError, ImportError):
        return False
    if difference := _difference(expected, found):
        raise ValueError(
            f"expected a base model with the tokenizer of {trained_with.path}, found that of {base.path}, "
            f"{difference}: set {BASE_KEY}"
        )
    return True


def warn_of_other_weights(adapter: str, trained_on: str, base: str, fingerprint: str, *, same_tokenizer: bool) -> None:
    """Say that drafts may be worse.

    Args:
        adapter: its path.
        trained_on: fingerprint of the base model it was trained on.
        base: path of the base model in use.
        fingerprint: of this one.
        same_tokenizer: whether the tokenizers were found to agree.
    """
    unchecked = "" if same_tokenizer else "; the tokenizers could not be compared"
    warnings.warn(
        f"{base} (fingerprint {fingerprint[:NUM_FINGERPRINT_DIGITS]}) is not the base model that {adapter} was trained "
        f"on ({trained_on[:NUM_FINGERPRINT_DIGITS]}): texts are its own, but fewer tokens per call may be accepted"
        f"{unchecked}",
        stacklevel=2,
    )


def _difference(expected: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase) -> str | None:
    ours, theirs = expected.get_vocab(), found.get_vocab()
    if different := {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}:
        return f"whose vocabularies differ in {len(different):,} tokens ({few(map(repr, different), limit=3)})"
    for text in PROBES:
        ids, other_ids = (one.encode(text, add_special_tokens=False, verbose=False) for one in (expected, found))
        if ids != other_ids:
            return f"which splits {text!r} into {other_ids[:8]}, not {ids[:8]}"
    return None
