"""What the student can do at every place of a text, whether or not a decoder lands there.

Validation asks the student at places drawn at random, a decoder where the last draft has broken off. Asking it
everywhere along the decoded texts tells both apart: what other texts cost, and what landing at hard places costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptp_lightning.decoding.drafting import StudentDrafter, draft_windows
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.state import begin
from ptp_lightning.models.network import PredictorNetwork


@torch.inference_mode()
def correct_everywhere(
    predictor: PredictorNetwork, prompt: Sequence[int], text: Sequence[int], settings: GenerationSettings
) -> list[int]:
    """Correct tokens of the draft that follows each place of a text, as a decoder would make it there.

    Args:
        predictor: in eval mode.
        prompt: token ids before the text.
        text: what the base model samples for these settings.
        settings: of the text; drafts have `window_length` tokens.

    Returns:
        One number a place, 1 .. `window_length`, the exact first token counted; of those places that a whole draft
        follows, the first of which is the text's first token.
    """
    length = settings.window_length
    context, _, unread, counts = begin(predictor, [prompt], settings, None, None)
    drafter = StudentDrafter(predictor.config.objective, context.sampling)
    known = torch.tensor([list(text)], device=context.device)
    correct: list[torch.Tensor] = []
    for start in range(len(text) - length + 1):
        _, slots = context.read(unread, Lookahead.single(counts, length - 1, context.device))
        context.keep(counts)
        draft = draft_windows(context, drafter, known[:, start : start + 1], slots, [start])
        right = draft == known[:, start : start + length]
        correct.append(right.cumprod(dim=1).sum())
        unread, counts = known[:, start : start + 1], [1]
    return torch.stack(correct).tolist() if correct else []
