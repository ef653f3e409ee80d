"""StudentWindows: the student writes the windows and the teacher corrects them (on-policy distillation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.distributions import chunked_pick
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.student_draft import student_draft
from ptp_lightning.training.windows.teacher_distributions import distributions_along
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource, until_end_of_text


@dataclass(frozen=True)
class StudentWindows(WindowSource):
    """Algorithm 2 with swapped roles: u is drawn, the student drafts tokens, and the teacher picks with the same u.

    The teacher reads the student's tokens, correct or not. Its distribution at position k is Q(. | context, the
    student's tokens before k), and the reference token is `Pick(u_k, Q_k)`. Up to the student's first error these are
    the teacher's own samples. After it they continue the student's text, so every position is trained on the text that
    decoding would show it.

    The student's token at position j is a function of the auxiliaries up to u_j, so the target at k is a function of
    the auxiliaries that the slots carry. The first token is exact; by induction, only a student equal to the teacher
    agrees with its targets everywhere. A student that ignores u (the independent baseline) learns the continuation of
    its own incompatible tokens instead of the teacher's marginals.

    Each call costs one pass of the student, its correction, and one parallel pass of the base model over
    B x N x (L - 1) tokens. A window ends after the student's end-of-text token.
    """

    @torch.no_grad()
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        shape = (*context.batch.window_starts.shape, predictor.config.window_length)
        auxiliaries = draw_auxiliaries(shape, generator, context.batch.input_ids.device)
        first = context.sampling.distribution(predictor.logits(context.first_hidden))
        draft = student_draft(predictor, context, auxiliaries, pick(auxiliaries[..., 0], first)).token_ids
        teacher, target = distributions_along(predictor, context, draft)
        token_ids = chunked_pick(auxiliaries, teacher)
        # Logits of another call may be rounded differently; the first token is the one that the slots follow.
        token_ids[..., 0] = draft[..., 0]
        return WindowSample(
            token_ids=token_ids,
            auxiliaries=auxiliaries,
            mask=until_end_of_text(draft, context.end_of_text),
            teacher=teacher,
            target=target,
            conditioning_ids=draft,
        )
