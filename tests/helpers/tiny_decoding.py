"""Decoding one text at a time, and drafts that are right or wrong on purpose, for tests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ptp_lightning.decoding import Decoded, GenerationSettings, decode_autoregressively
from ptp_lightning.models.network import PredictorNetwork
from tests.helpers.tiny_windows import one_document

PROMPT = [3, 1, 4, 1, 5]
Decode = Callable[..., list[Decoded]]


def decode_one(
    decode: Decode,
    predictor: PredictorNetwork,
    settings: GenerationSettings,
    prompt: Sequence[int] = PROMPT,
    **options: Any,
) -> Decoded:
    """The text of one prompt."""
    (decoded,) = decode(predictor, [prompt], settings, **options)
    return decoded


def reference(predictor: PredictorNetwork, settings: GenerationSettings, prompt: Sequence[int] = PROMPT) -> list[int]:
    """What the base model samples, one token a call."""
    return decode_one(decode_autoregressively, predictor, settings, prompt).token_ids


@torch.inference_mode()
def slot_logits_of_training(
    predictor: PredictorNetwork, text: Tensor, first: int, auxiliaries: Tensor, draft: Tensor | None
) -> Tensor:
    """What training computes for the slots of one window.

    Args:
        predictor: whose slots they are.
        text: `[1, S]`, prompt and new tokens.
        first: place of the window's first token in it, which is exact.
        auxiliaries: `[1, J + 1]`, of the window.
        draft: `[1, J]`, what the pass before proposed after the first token; None before any refinement.

    Returns:
        `[1, J, V]`.
    """
    context = predictor.encode(one_document(text[:, :first], torch.tensor([[first]])))
    hidden = predictor.slot_hidden(context, auxiliaries.unsqueeze(1))
    if draft is not None:
        stand_for = torch.cat([text[:, first : first + 1], draft], dim=1)[:, None, :-1]
        hidden = predictor.refine(context, predictor.refiner_context(context), hidden, stand_for)
    return predictor.slot_logits(hidden[:, 0])


class ForcedDraft:
    """Knows the reference texts and proposes the right token with a given probability, else another one.

    Args:
        texts: of the prompts that are decoded, in their order, as long as no text is finished before another.
        probability_right: of each token.
        vocabulary: number of tokens.
    """

    def __init__(self, texts: list[list[int]], probability_right: float, vocabulary: int) -> None:
        longest = max(map(len, texts))
        self.texts = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        self.probability_right = probability_right
        self.vocabulary = vocabulary
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        assert slot_logits.shape[:2] == auxiliaries.shape
        places = torch.tensor(starts).unsqueeze(1) + torch.arange(auxiliaries.shape[1])
        right = self.texts.gather(1, places.clamp_max(self.texts.shape[1] - 1))
        is_right = torch.rand(right.shape, generator=self.generator) < self.probability_right
        return torch.where(is_right, right, (right + 1) % self.vocabulary)
