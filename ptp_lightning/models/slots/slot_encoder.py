"""SlotEncoder: the auxiliaries of a window become the input embeddings of its slots."""

from typing import Literal

from torch import Tensor, nn

from ptp_lightning.models.refiner.refiner import Refiner
from ptp_lightning.models.slots.auxiliary_embedding import AuxiliaryEmbedding
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.models.slots.sampling_range import SettingsEmbedding


class SlotEncoder(nn.Module):
    """Auxiliaries of a window -> input embeddings of its L - 1 slots.

    A slot's embedding is one learned vector, which starts as the mean token embedding, plus an embedding of each
    auxiliary that the objective lets it carry.

    Args:
        objective: what slots carry.
        features: features of u.
        head: head of the auxiliary embedding.
        token_embeddings: `[V, H]`, sets the starting point and scale.

    Attributes:
        refiner: what else slots learn, after the stack; set by the predictor, which knows the base model.
        settings: tells slots the sampling settings, of a predictor that is trained for several; likewise.
        refiner_settings: tells the refiner's slots.
        token_ranks: `[V]` int64, places in the order "embedding" if slots are trained in it (see `Sampler`); likewise.
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
        self.refiner: Refiner | None = None
        self.settings: SettingsEmbedding | None = None
        self.refiner_settings: SettingsEmbedding | None = None
        self.token_ranks: Tensor | None
        self.register_buffer("token_ranks", None)

    def forward(self, auxiliaries: Tensor) -> Tensor:
        """Map auxiliaries `[..., L]` to `[..., L - 1, H]`."""
        slots = self.placeholder.expand(*auxiliaries.shape[:-1], auxiliaries.shape[-1] - 1, -1)
        for embedding, carried in zip(self.embeddings, self.objective.inputs(auxiliaries), strict=True):
            slots = slots + embedding(carried)
        return slots
