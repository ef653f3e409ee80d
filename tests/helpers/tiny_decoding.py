"""Decoding of one text, and drafts with a given acceptance rate, for tests."""

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
    """The tokens that the base model samples autoregressively."""
    return decode_one(decode_autoregressively, predictor, settings, prompt).token_ids


@torch.inference_mode()
def slot_logits_of_training(
    predictor: PredictorNetwork, text: Tensor, first: int, auxiliaries: Tensor, draft: Tensor | None
) -> Tensor:
    """The slot logits of one window as computed in training.

    Args:
        predictor: of the slots.
        text: `[1, S]`, prompt and new tokens.
        first: index of the window's first token in the text; it is exact.
        auxiliaries: `[1, J + 1]`, of the window.
        draft: `[1, J]`, draft tokens after the first token from the previous pass; None before refinement.

    Returns:
        `[1, J, V]`.
    """
    context = predictor.encode(one_document(text[:, :first], torch.tensor([[first]])))
    hidden = predictor.slot_hidden(context, auxiliaries.unsqueeze(1), text[:, first : first + 1])
    if draft is not None:
        stands_for = torch.cat([text[:, first : first + 1], draft], dim=1)[:, None, :-1]
        hidden = predictor.correct(context, predictor.correction_context(context), hidden, stands_for)
    return predictor.slot_logits(hidden[:, 0])


class SlotsOfTraining:
    """A drafter that compares its slots with those of training; its third drafted token is wrong.

    Args:
        predictor: without a correction.
        settings: of the text.
        tokens: the reference text after `PROMPT`.
        vocabulary: number of tokens.

    Attributes:
        begins: number of new tokens before each draft.
    """

    def __init__(
        self, predictor: PredictorNetwork, settings: GenerationSettings, tokens: list[int], vocabulary: int
    ) -> None:
        self.begins: list[int] = []
        self._predictor = predictor
        self._auxiliaries = settings.auxiliaries(1, torch.device("cpu"))
        self._text = torch.tensor([[*PROMPT, *tokens]])
        self._vocabulary = vocabulary

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        (start,) = starts
        num_slots = auxiliaries.shape[1]
        of_window = self._auxiliaries[:, start - 1 : start + num_slots]
        begin = len(PROMPT) + start
        expected = slot_logits_of_training(self._predictor, self._text, begin - 1, of_window, None)
        torch.testing.assert_close(slot_logits, expected, atol=1e-4, rtol=1e-4)
        self.begins.append(start)
        draft = self._text[:, begin : begin + num_slots].clone()
        draft[:, 2:] += 1
        return draft % self._vocabulary


class ForcedDraft:
    """Drafts tokens of the reference texts, each correct with a given probability.

    Args:
        texts: reference texts of the decoded prompts, in their order, which must end at the same time.
        acceptance_rate: probability that a token is correct.
        vocabulary: number of tokens.
    """

    def __init__(self, texts: list[list[int]], acceptance_rate: float, vocabulary: int) -> None:
        longest = max(map(len, texts))
        self.texts = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        self.acceptance_rate = acceptance_rate
        self.vocabulary = vocabulary
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        assert slot_logits.shape[:2] == auxiliaries.shape
        positions = torch.tensor(starts).unsqueeze(1) + torch.arange(auxiliaries.shape[1])
        correct = self.texts.gather(1, positions.clamp_max(self.texts.shape[1] - 1))
        is_correct = torch.rand(correct.shape, generator=self.generator) < self.acceptance_rate
        return torch.where(is_correct, correct, (correct + 1) % self.vocabulary)
