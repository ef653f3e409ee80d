"""TeacherWindows: the base model continues the context token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.auxiliary_strategies import AuxiliaryStrategy
from ptp_lightning.distributions import chunked_token_interval
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.student_probe import student_probe
from ptp_lightning.training.windows.teacher_distributions import RolloutDistributions
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource, until_end_of_text


@dataclass(frozen=True)
class TeacherWindows(WindowSource):
    """Windows that the base model samples: u is drawn first, then `t_k = Pick(u_k, Q_k)`, token after token.

    All windows of all rows advance together, in L - 1 cached calls of B x N tokens. A window ends after the
    end-of-text token.

    Args:
        strategy: draws the auxiliaries again, inside the intervals of the tokens; by default they are not redrawn and
            are uniform.
    """

    strategy: AuxiliaryStrategy | None = None

    @torch.no_grad()
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        length = predictor.config.window_length
        shape = (*context.batch.window_starts.shape, length)
        auxiliaries = draw_auxiliaries(shape, generator, context.batch.input_ids.device)
        hidden = context.first_hidden
        tokens: list[Tensor] = []
        rollout = RolloutDistributions(predictor, context)
        reader = predictor.incremental_reader(context)
        with predictor.gate.closed():
            for offset in range(length):
                if offset > 0:
                    newest = predictor.embed(tokens[-1]).unsqueeze(2)
                    hidden = reader.read(newest).squeeze(2)
                tokens.append(pick(auxiliaries[..., offset], rollout.add(hidden)))
        token_ids = torch.stack(tokens, dim=-1)
        mask = until_end_of_text(token_ids, context.end_of_text)
        teacher, target = rollout.teacher_and_target()
        if self.strategy is not None:
            interval = chunked_token_interval(teacher, token_ids)
            auxiliaries = self.strategy.draw(*interval, generator, student_probe(predictor, context, token_ids))
        return WindowSample(token_ids, auxiliaries, mask, teacher, target, conditioning_ids=token_ids)
