"""Sizes that a stored configuration declares are those of the stored weights, before memory is allocated for them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.correction.markov_head import MarkovHead
from ptp_lightning.models.correction.token_conditioned_head import TokenConditionedHead
from ptp_lightning.models.stored_state import (
    DAMAGED,
    DRAFT_TOKEN_IDS,
    NGRAM_TOKEN_IDS,
    TOKEN_RANKS,
    require_stored_types,
)
from ptp_lightning.utils.pretrained import few

FIRST_EMBEDDING_WEIGHTS = ("embeddings.0.head.0.weight", "embeddings.0.head.weight")  # head: mlp, linear
CORRECTION = "slot_encoder.correction."


def require_stored_sizes(state: Mapping[str, Tensor], config: PredictorConfig) -> None:
    """Refuse a configuration whose layers are larger than the stored weights, and weights that have no sizes.

    Args:
        state: names and values as in `PredictorNetwork.trainable_state`.
        config: as stored beside them.

    Raises:
        ValueError: names the key or the tensor.
    """
    require_stored_types(state)
    if TOKEN_RANKS in state:  # read before the others
        _size(state, TOKEN_RANKS)
    ranks = {_size(state, name) for name in state if ".lora_A." in name}
    largest = max([config.lora.rank, *config.lora.rank_pattern.values()])
    if config.has_lora and largest > max(ranks, default=0):
        raise ValueError(
            f"expected predictor.lora.rank as in the stored weights, {few(ranks) or 'none'}, found {largest}"
        )
    inputs = {_size(state, name, 1) for name in state if name.endswith(FIRST_EMBEDDING_WEIGHTS)}
    if inputs - {config.features.num_features}:
        raise ValueError(
            f"expected predictor.features with as many features as in the stored weights, {few(inputs)}, found "
            f"{config.features.num_features}"
        )
    for key, (declared, stored) in _sizes_of_correction(state, config).items():
        if declared > stored:
            raise ValueError(f"expected predictor.{key} as in the stored weights, {stored}, found {declared}")


def _sizes_of_correction(state: Mapping[str, Tensor], config: PredictorConfig) -> dict[str, tuple[int, int]]:
    """Declared and stored sizes of the correction and of what was counted, by key."""

    def rows(name: str) -> int:
        return _size(state, name) if name in state else 0

    correction, arguments = config.correction, "correction.init_args"
    sizes = {
        "draft_vocabulary": (config.draft_vocabulary or 0, rows(DRAFT_TOKEN_IDS)),
        "ngrams": (config.ngrams or 0, rows(NGRAM_TOKEN_IDS)),
    }
    if config.slot_layers == 0:
        sizes["window_length"] = config.window_length, 1 + rows("slot_encoder.layerless.positions")
    if isinstance(correction, TokenConditionedHead):
        sizes[f"{arguments}.intermediate_size"] = correction.intermediate_size, rows(f"{CORRECTION}up.weight")
    elif isinstance(correction, MarkovHead):
        sizes[f"{arguments}.rank"] = correction.rank, rows(f"{CORRECTION}encode.weight")
    elif isinstance(correction, DecoderRefiner):
        layers = f"{CORRECTION}layers."
        stored = {name.removeprefix(layers).partition(".")[0] for name in state if name.startswith(layers)}
        width = rows(f"{layers}0.mlp.gate_proj.weight")
        sizes[f"{arguments}.num_layers"] = correction.num_layers, len(stored)
        sizes[f"{arguments}.intermediate_size"] = correction.intermediate_size or 0, width
    return sizes


def _size(state: Mapping[str, Tensor], name: str, dimension: int = 0) -> int:
    shape = list(state[name].shape)
    if len(shape) <= dimension:
        raise ValueError(f"expected {name} of {dimension + 1} dimensions or more, found shape {shape}: {DAMAGED}")
    return shape[dimension]
