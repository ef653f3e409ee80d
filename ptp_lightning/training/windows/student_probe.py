"""student_probe: which tokens of given windows the student drafts, for strategies that adapt to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.auxiliary_strategies import ProbeResult, StudentProbe
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.chunks import map_chunks
from ptp_lightning.training.windows.student_draft import without_dropout


def student_probe(predictor: PredictorNetwork, context: Context, token_ids: Tensor) -> StudentProbe:
    """A function of auxiliaries that compares the student's draft with given windows.

    A correction is conditioned on the given tokens, as in training: predictions after a wrong token are of no use.

    Args:
        predictor: base model and student.
        context: of `predictor.encode`.
        token_ids: `[B, N, L]` int64, the given tokens.
    """

    def probe_chunk(hidden: Tensor, u: Tensor, tokens: Tensor) -> ProbeResult:
        objective, sampling = predictor.config.objective, context.sampling
        logits = predictor.slot_logits(hidden).float()
        correct = objective.tokens_from_logits(logits, u, sampling) == tokens
        if not objective.predicts_distribution:
            return ProbeResult(correct, None)
        return ProbeResult(correct, token_interval(sampling.for_student().distribution(logits), tokens))

    @torch.no_grad()
    def probe(auxiliaries: Tensor) -> ProbeResult:
        with without_dropout(predictor):
            hidden = predictor.slot_hidden(context, auxiliaries, token_ids[..., 0])
            if predictor.correction is not None:
                pairs = predictor.correction_context(context)
                hidden = predictor.correct(context, pairs, hidden, token_ids[..., :-1])
        later = token_ids[..., 1:]
        results = map_chunks(probe_chunk, hidden.flatten(0, -2), auxiliaries[..., 1:].flatten(), later.flatten())

        def with_first(value: float, chunks: list[Tensor]) -> Tensor:
            return torch.nn.functional.pad(torch.cat(chunks).view_as(later), (1, 0), value=value)

        # The first token is picked from the base model's distribution, so it is correct for every u.
        correct = with_first(True, [result.correct for result in results])
        intervals = [result.interval for result in results if result.interval is not None]
        if not intervals:
            return ProbeResult(correct, None)
        lower = with_first(0.0, [ends[0] for ends in intervals])
        upper = with_first(1.0, [ends[1] for ends in intervals])
        return ProbeResult(correct, (lower, upper))

    return probe
