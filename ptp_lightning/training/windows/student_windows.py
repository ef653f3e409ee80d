"""StudentWindows: the student writes the windows, and the teacher says what it would have picked (on-policy)."""

from dataclasses import dataclass

import torch

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.distributions import picks
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.student_proposals import distributions_along, student_draft
from ptp_lightning.training.windows.windows import WindowSample, WindowSource, until_end


@dataclass(frozen=True)
class StudentWindows(WindowSource):
    """Algorithm 2 with swapped roles: u is drawn first, the student proposes, and the teacher picks for the same u.

    The teacher reads the student's tokens, right or wrong: its distribution at k is Q(. | context, the student's tokens
    before k), and the reference token its pick Pick(u_k, Q_k). Up to the student's first error these are the teacher's
    own samples. Behind it they continue the student's text, so that every position is trained on the text that the
    slots before it have made up.

    The student's token at j is a function of u up to u_j. So the target at k is a function of the auxiliaries that
    the slots know, loss by loss the same in every step, and by induction from the first token, which is exact, the
    only student that agrees with its targets everywhere is the teacher. A student that has to ignore u (the
    independent baseline) is different: it learns what follows its own incompatible tokens, not the marginals of the
    teacher.

    One call of the student (and the refiner's rounds) and one parallel call of the base model over B x N x (L - 1)
    tokens each. A window ends after the end-of-text token of the student.
    """

    @torch.no_grad()
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        shape = (*context.batch.window_starts.shape, predictor.config.window_length)
        auxiliaries = draw_auxiliaries(shape, generator, context.batch.input_ids.device)
        first = context.sampling.distribution(predictor.logits(context.first_hidden))
        draft = student_draft(predictor, context, auxiliaries, pick(auxiliaries[..., 0], first)).token_ids
        teacher, target = distributions_along(predictor, context, draft)
        token_ids = picks(auxiliaries, teacher)
        token_ids[..., 0] = draft[..., 0]  # the teacher's own, however the rounding of another call's logits falls out
        return WindowSample(
            token_ids=token_ids,
            auxiliaries=auxiliaries,
            mask=until_end(draft, context.end_of_text),
            teacher=teacher,
            target=target,
            conditioning_ids=draft,
        )
