"""The state of a predictor that is stored: names of what is not trained, and what is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptp_lightning.models.draft_head import require_draft_vocabulary
from ptp_lightning.models.token_order import require_permutation
from ptp_lightning.ngrams import Ngrams, require_ngrams

TOKEN_RANKS = "slot_encoder.token_ranks"
DRAFT_TOKEN_IDS = "slot_encoder.draft_token_ids"
NGRAM_TOKEN_IDS = "slot_encoder.ngrams.token_ids"
NGRAM_PROBABILITIES = "slot_encoder.ngrams.probabilities"
NOT_TRAINED = frozenset({TOKEN_RANKS, DRAFT_TOKEN_IDS, NGRAM_TOKEN_IDS, NGRAM_PROBABILITIES})
"""Stored nevertheless: trained slots depend on them, or they were counted in training data."""

INTEGERS, FLOATS = (torch.int32, torch.int64), (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What token ids and all other numbers may be stored in."""
DAMAGED = "it is damaged, take another copy of the adapter"


def require_stored_types(state: Mapping[str, Tensor]) -> None:
    """Refuse numbers of another kind, which would be rounded in silence when they are loaded.

    Args:
        state: names and values as stored.

    Raises:
        ValueError: names the first such tensor.
    """
    for name in sorted(state):
        kinds = INTEGERS if name in NOT_TRAINED - {NGRAM_PROBABILITIES} else FLOATS
        found = getattr(state[name], "dtype", type(state[name]).__name__)
        if found not in kinds:
            one_of = ", ".join(map(_plain_name, kinds))
            raise ValueError(f"expected {name} in one of {one_of}, found {_plain_name(found)}: {DAMAGED}")


def require_finite_weights(state: Mapping[str, Tensor]) -> None:
    """Refuse weights with which every draft would fail.

    Args:
        state: names and values, see `require_stored_types`.

    Raises:
        ValueError: a NaN or infinity is among them, also after they are converted to float32; names the tensor.
    """
    for name in sorted(state.keys() - NOT_TRAINED):
        if not state[name].float().isfinite().all():
            raise ValueError(f"expected finite weights in {name}, found a NaN or infinity: {DAMAGED}")


def require_stored_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor], vocab_size: int) -> None:
    """Refuse a state that is not that of a predictor.

    Args:
        state: names and values as stored.
        own: names and values of the predictor.
        vocab_size: V, of its base model.

    Raises:
        ValueError: a weight is missing, unknown, of another kind or of another shape, the token order is no
            permutation, or the draft vocabulary or n-grams are none.
    """
    if wrong := sorted(own.keys() ^ state.keys()):
        raise ValueError(
            f"expected the {len(own)} weights of this predictor, found a checkpoint that differs in {wrong[:4]}: "
            "set predictor.student, predictor.lora, predictor.objective, predictor.head, predictor.correction, "
            "predictor.draft_vocabulary, predictor.ngrams, predictor.sampling_range or predictor.sampling.order"
        )
    if shapes := [name for name in own if own[name].shape != state[name].shape]:
        raise ValueError(
            f"expected {shapes[0]} of shape {list(own[shapes[0]].shape)}, found {list(state[shapes[0]].shape)}: set "
            "predictor.lora.rank, predictor.features, predictor.correction, predictor.draft_vocabulary or "
            "predictor.ngrams"
        )
    require_stored_types(state)
    if TOKEN_RANKS in state:
        require_permutation(state[TOKEN_RANKS], len(own[TOKEN_RANKS]))
    if DRAFT_TOKEN_IDS in state:
        require_draft_vocabulary(state[DRAFT_TOKEN_IDS], len(own[DRAFT_TOKEN_IDS]), vocab_size)
    if NGRAM_TOKEN_IDS in state:
        require_ngrams(Ngrams(state[NGRAM_TOKEN_IDS], state[NGRAM_PROBABILITIES]), vocab_size)


def _plain_name(kind: object) -> str:
    return str(kind).removeprefix("torch.")
