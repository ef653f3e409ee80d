"""AnalyticWindows: a Markov chain's own conditionals as the teacher, so that what students should learn is known."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.data.series.markov import MarkovSeries
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.windows.windows import WindowSample, WindowSource, stack


@dataclass(frozen=True)
class AnalyticWindows(WindowSource):
    """The chain goes on from the tokens before a window: u is drawn first, then t_k = Pick(u_k, Q_k).

    Rows are those of a `SeriesDataModule` of the same series. The base model's own distributions play no part; the
    sampling settings act on the chain's.

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
        # A row begins with the id that stands for an unknown token, and so does a history that reaches beyond it.
        index = (batch.window_starts.unsqueeze(-1) + before).clamp_min(0)
        history = batch.input_ids.gather(1, index.flatten(1)).view_as(index)  # [B, N, order]
        vocab_size = predictor.base_model.config.vocab_size
        teachers: list[TokenDistribution] = []
        targets: list[TokenDistribution] = []
        tokens: list[Tensor] = []
        for offset in range(length):
            logits = self.series.conditionals(history).log().float()
            impossible = vocab_size - logits.shape[-1]  # the beginning of a row and whatever else the model knows
            teacher, target = context.sampling.teacher_and_target(
                torch.nn.functional.pad(logits, (0, impossible), value=-torch.inf)
            )
            teachers.append(teacher)
            targets.append(target)
            tokens.append(pick(auxiliaries[..., offset], teacher))
            history = torch.cat([history[..., 1:], tokens[-1].unsqueeze(-1)], dim=-1)
        token_ids = torch.stack(tokens, dim=-1)
        mask = torch.ones_like(token_ids, dtype=torch.bool)
        return WindowSample(token_ids, auxiliaries, mask, stack(teachers), stack(targets), token_ids)
