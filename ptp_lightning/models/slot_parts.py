"""The slot encoder of a predictor, with the parts that its configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.correction.decoder_refiner import Refiner
from ptp_lightning.models.ngram_table import NgramTable
from ptp_lightning.models.slots.late_entry import LateEntry
from ptp_lightning.models.slots.layerless_slots import LayerlessSlots
from ptp_lightning.models.slots.sampling_encoder import SamplingEncoder
from ptp_lightning.models.slots.slot_encoder import SlotEncoder
from ptp_lightning.models.token_order import require_permutation, similar_tokens_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_slot_encoder(
    config: PredictorConfig, backbone: PreTrainedModel, first_slot_layer: int, token_ranks: Tensor | None = None
) -> SlotEncoder:
    """An untrained slot encoder; its draft vocabulary is set with the draft head.

    Args:
        config: of the predictor.
        backbone: the base model, not yet changed.
        first_slot_layer: see `PredictorNetwork`.
        token_ranks: `[V]`, a stored order "embedding"; by default it is computed if needed.

    Raises:
        ValueError: `token_ranks` are no permutation, or the correction does not fit the base model.
    """
    table: Tensor = backbone.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
    encoder = SlotEncoder(config.objective, config.features, config.head, table)
    if config.correction is not None:
        encoder.correction = config.correction.build(backbone, config.draft_vocabulary or len(table))
    if config.sampling_range is not None:
        encoder.sampling_encoder = SamplingEncoder(*table.shape)
        if isinstance(encoder.correction, Refiner):
            encoder.correction_sampling_encoder = SamplingEncoder(*table.shape)
    if config.sampling.order == "embedding":
        ranks = similar_tokens_together(table) if token_ranks is None else token_ranks.to(torch.int64, copy=True)
        require_permutation(ranks, len(table))
        encoder.token_ranks = ranks
    if config.ngrams is not None:
        encoder.ngrams = NgramTable(config.ngrams)
    if config.slot_layers == 0:
        encoder.layerless = LayerlessSlots(
            table.shape[1],
            config.window_length - 1,
            reads_slots=config.objective.num_inputs > 0 or config.sampling_range is not None,
            of_bfloat16_model=backbone.dtype == torch.bfloat16,
        )
    elif first_slot_layer:
        encoder.late_entry = LateEntry(table.shape[1])
    return encoder
