"""AnalyticWindows: the teacher is a Markov chain, so that the optimum of a student is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.data.series.markov import MarkovSeries
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.windows.teacher_distributions import stack_positions
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource


@dataclass(frozen=True)
class AnalyticWindows(WindowSource):
    """The chain continues the context: u is drawn first, then `t_k = Pick(u_k, Q_k)` from its conditionals.

    Rows must be those of a `SeriesDataModule` of the same series. The base model's distributions are not used; the
    sampling settings apply to the chain's conditionals.

    Args:
        series: the chain.
    """

    series: MarkovSeries = field(default_factory=MarkovSeries)

    @torch.no_grad()
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        batch, length, order = context.batch, predictor.config.window_length, self.series.order
        auxiliaries = draw_auxiliaries((*batch.window_starts.shape, length), generator, batch.input_ids.device)
        before = torch.arange(-order, 0, device=batch.input_ids.device)
        # A row begins with the id of an unknown token; a history that reaches beyond the row is filled with it.
        index = (batch.window_starts.unsqueeze(-1) + before).clamp_min(0)
        history = batch.input_ids.gather(1, index.flatten(1)).view_as(index)  # [B, N, order]
        vocab_size = predictor.base_model.config.vocab_size
        teachers: list[TokenDistribution] = []
        targets: list[TokenDistribution] = []
        tokens: list[Tensor] = []
        for offset in range(length):
            logits = self.series.conditionals(history).log().float()
            num_other = vocab_size - logits.shape[-1]  # ids of the model that are no values of the series
            teacher, target = context.sampling.teacher_and_target(
                torch.nn.functional.pad(logits, (0, num_other), value=-torch.inf)
            )
            teachers.append(teacher)
            targets.append(target)
            tokens.append(pick(auxiliaries[..., offset], teacher))
            history = torch.cat([history[..., 1:], tokens[-1].unsqueeze(-1)], dim=-1)
        token_ids = torch.stack(tokens, dim=-1)
        return WindowSample(
            token_ids=token_ids,
            auxiliaries=auxiliaries,
            mask=torch.ones_like(token_ids, dtype=torch.bool),
            teacher=stack_positions(teachers),
            target=stack_positions(targets),
            conditioning_ids=token_ids,
        )
