"""SlotEncoder: from the auxiliaries of a window to the input embeddings of its slots."""

from typing import Literal

from torch import Tensor, nn

from ptp_lightning.models.correction.correction import CorrectionModule
from ptp_lightning.models.ngram_table import NgramTable
from ptp_lightning.models.slots.auxiliary_embedding import AuxiliaryEmbedding
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.late_entry import LateEntry
from ptp_lightning.models.slots.layerless_slots import LayerlessSlots
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.models.slots.sampling_encoder import SamplingEncoder


class SlotEncoder(nn.Module):
    """From the auxiliaries of a window to the input embeddings of its L - 1 slots.

    A slot's embedding is one learned vector, initialised with the mean token embedding, plus an embedding of each
    auxiliary that the slot carries.

    Args:
        objective: which auxiliaries slots carry.
        features: features of u.
        head: head of the auxiliary embedding.
        token_embeddings: `[V, H]`, for the initialisation.

    Attributes:
        correction: predicts drafts again, if there is one. This and the following are set by `PredictorNetwork`.
        sampling_encoder: conditions slots on the sampling settings, if the predictor is trained for several.
        correction_sampling_encoder: the same for a `Refiner`.
        late_entry: of slots that run through some of the last layers alone; else None.
        layerless: what makes slots that run through no layer; else None.
        token_ranks: `[V]` int64, the order "embedding" if slots are trained in it (see `Sampler`).
        draft_token_ids: `[N]` int32, ascending, the tokens that slots can draft; None for all.
        ngrams: continuations that were counted in training data, if any.
    """

    def __init__(
        self,
        objective: Objective,
        features: AuxiliaryFeatures,
        head: Literal["linear", "mlp"],
        token_embeddings: Tensor,
    ) -> None:
        super().__init__()
        self.objective = objective
        table = token_embeddings.detach().float()
        mean = table.mean(0)
        scale = float((table - mean).square().mean().sqrt())
        self.placeholder = nn.Parameter(mean.clone())
        self.embeddings = nn.ModuleList(
            AuxiliaryEmbedding(features, head, table.shape[1], scale) for _ in range(objective.num_inputs)
        )
        self.correction: CorrectionModule | None = None
        self.sampling_encoder: SamplingEncoder | None = None
        self.correction_sampling_encoder: SamplingEncoder | None = None
        self.late_entry: LateEntry | None = None
        self.layerless: LayerlessSlots | None = None
        self.token_ranks: Tensor | None
        self.register_buffer("token_ranks", None)
        self.draft_token_ids: Tensor | None
        self.register_buffer("draft_token_ids", None)
        self.ngrams: NgramTable | None = None

    def forward(self, auxiliaries: Tensor) -> Tensor:
        """Map auxiliaries `[..., L]` to `[..., L - 1, H]`."""
        slots = self.placeholder.expand(*auxiliaries.shape[:-1], auxiliaries.shape[-1] - 1, -1)
        for embedding, carried in zip(self.embeddings, self.objective.inputs(auxiliaries), strict=True):
            slots = slots + embedding(carried)
        return slots
