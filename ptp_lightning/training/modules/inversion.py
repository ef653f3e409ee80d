"""The inversion of inverse autoregressive training: auxiliaries that pick given tokens from the model's predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.auxiliary_strategies import RelativeStrategy
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork


class InverseAuxiliaries(NamedTuple):
    """Auxiliaries that pick given tokens from the model's own predictions.

    Attributes:
        values: `[B, N, L - 1]` float64, u of every token of a window but the last, which no slot carries.
        found: `[B, N, L - 1]` bool; false for a token of probability zero, which no u picks (its value is 0).
    """

    values: Tensor
    found: Tensor


@torch.no_grad()
def invert(
    predictor: PredictorNetwork,
    context: Context,
    token_ids: Tensor,
    strategy: RelativeStrategy,
    generator: torch.Generator,
) -> InverseAuxiliaries:
    """The auxiliaries of Algorithm 3 (Draxler et al., ICLR 2026): for k = i, i + 1, ...

        P_k = P_theta(. | t_<i, u_i .. u_{k-1})    and    u_k in [F_{t_k - 1}, F_{t_k}) of P_k.

    P_i is the autoregressive prediction, so it needs no further call. All windows of all rows advance together, one
    slot per window in each of L - 2 cached calls: B x N x (L - 2) positions in total.

    Args:
        predictor: its student must be the base model itself.
        context: of `encode`; it is not changed.
        token_ids: `[B, N, L]`, the windows' tokens.
        strategy: draws each auxiliary in its interval.
        generator: of the draws.
    """
    length = token_ids.shape[2]
    sampling = context.sampling.for_student()
    logits = predictor.logits(context.first_hidden)
    reader = predictor.incremental_reader(context)
    values: list[Tensor] = []
    found: list[Tensor] = []
    for offset in range(length - 1):
        if offset > 0:
            newest = predictor.embed_slots(append_unused_auxiliary(values[-1].unsqueeze(-1)), sampling.settings)
            logits = predictor.slot_logits(reader.read(newest).squeeze(2))
        lower, upper = token_interval(sampling.distribution(logits), token_ids[..., offset])
        values.append(strategy(lower, upper, generator))
        found.append(upper > lower)
    return InverseAuxiliaries(torch.stack(values, dim=-1), torch.stack(found, dim=-1))


def append_unused_auxiliary(auxiliaries: Tensor) -> Tensor:
    """`[..., J]` auxiliaries of slots as the `[..., J + 1]` of a window; no slot carries that of the last token."""
    return F.pad(auxiliaries, (0, 1))
