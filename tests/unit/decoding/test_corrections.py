"""Decoders write the reference text with every correction, and with slots that cannot draft every token."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from ptp_lightning.decoding import (
    GenerationSettings,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.decoding.drafting import StudentDrafter
from ptp_lightning.models.correction.correction import CorrectionHead, NextLogits, SlotHead
from ptp_lightning.models.correction.draft_order import draft_left_to_right
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, Decode, decode_one, reference
from tests.helpers.tiny_predictors import CORRECTIONS, tiny_predictor

VOCABULARY = 32
DRAFTED = tuple(range(1, VOCABULARY, 3))  # misses two thirds of the tokens
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "truncated": SamplingConfig(temperature=0.7, top_k=12, top_p=0.9),
    "full": SamplingConfig(),
    "by embedding": SamplingConfig(temperature=0.9, top_k=20, order="embedding"),
}
DECODERS: dict[str, Decode] = {
    "speculative": decode_speculatively,
    "partial_quadratic": decode_partially_quadratically,
}


@cache
def small(correction: str, objective: str = "categorical", student: str = "gated_lora") -> PredictorNetwork:
    return tiny_predictor(
        objective=objective,
        sampling=SamplingConfig(order="embedding"),
        correction=CORRECTIONS[correction],
        draft_vocabulary=DRAFTED,
        student=student,
        window_length=5,
        vocab_size=VOCABULARY,
    )


@one_in(2, correction=CORRECTIONS, sampling=SAMPLING, decoder=DECODERS)
def test_texts_do_not_depend_on_drafts(correction: str, sampling: str, decoder: str) -> None:
    predictor = small(correction)
    for seed in range(2):
        settings = GenerationSettings(SAMPLING[sampling], max_new_tokens=20, seed=seed, window_length=5)
        expected = reference(predictor, settings)
        assert decode_one(DECODERS[decoder], predictor, settings).token_ids == expected
        assert sampling == "greedy" or set(expected) - set(DRAFTED)  # there is something that slots cannot draft


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("objective", "student"), [("one_hot", "gated_lora"), ("sequential", "full_copy")])
def test_other_objectives_and_students(objective: str, student: str, decoder: str) -> None:
    predictor = small("token_conditioned", objective, student)
    settings = GenerationSettings(SAMPLING["truncated"], max_new_tokens=20, seed=3, window_length=5)
    assert decode_one(DECODERS[decoder], predictor, settings).token_ids == reference(predictor, settings)


def test_texts_of_a_batch() -> None:
    predictor, prompts = small("markov"), [PROMPT, PROMPT[:2], [7]]
    settings = GenerationSettings(SAMPLING["truncated"], max_new_tokens=16, seed=1, window_length=5)
    expected = decode_autoregressively(predictor, prompts, settings)
    found = decode_partially_quadratically(predictor, prompts, settings)
    assert [text.token_ids for text in found] == [text.token_ids for text in expected]


def test_slots_are_conditioned_on_the_drafted_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft is written from left to right: the first slot gets the exact token, each later one the last draft."""
    predictor = small("token_conditioned")
    head = predictor.correction
    assert isinstance(head, CorrectionHead)
    original = type(head).next_logits
    given: list[list[Tensor]] = []

    def recording(self: CorrectionHead, hidden: Tensor, slot_head: SlotHead) -> NextLogits:
        inner = original(self, hidden, slot_head)
        own: list[Tensor] = []
        given.append(own)

        def next_logits(slot: int, token_embeddings: Tensor) -> Tensor:
            assert slot == len(own)
            own.append(token_embeddings)
            return inner(slot, token_embeddings)

        return next_logits

    monkeypatch.setattr(type(head), "next_logits", recording)
    drafts: list[list[int]] = []
    settings = GenerationSettings(SAMPLING["truncated"], max_new_tokens=12, seed=0, window_length=5)
    original_read = predictor.embed

    def embed(token_ids: Tensor) -> Tensor:
        if token_ids.shape[1] == 5:
            drafts.append(token_ids[0].tolist())
        return original_read(token_ids)

    monkeypatch.setattr(predictor, "embed", embed)
    decode_one(decode_speculatively, predictor, settings, prompt=[3])
    draft, own = drafts[0], given[0]
    assert len(own) == 4
    with torch.inference_mode():
        expected = original_read(torch.tensor([draft[:-1]]))
    assert torch.equal(torch.cat(own, dim=1), expected)


class _OnGPU(TorchFunctionMode):
    """Lets code take its paths for GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func == Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))  # pyright: ignore


@pytest.mark.parametrize("correction", ["token_conditioned", "markov"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_slots_are_drafted_without_waiting_for_the_device(correction: str, sampling: str) -> None:
    """Fake tensors have no values, and reading one raises: so no slot waits for the tokens before it."""
    predictor = small(correction)
    head = predictor.correction
    assert isinstance(head, CorrectionHead)
    drafter = StudentDrafter(predictor.config.objective, predictor.sampler(SAMPLING[sampling]))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _OnGPU():
        slots, u = torch.empty(3, 4, 32), torch.empty(3, 4, dtype=torch.float64)
        next_logits = head.next_logits(slots, predictor.slot_logits)

        def predict(slot: int, token_ids: Tensor) -> Tensor:
            return drafter(next_logits(slot, predictor.embed(token_ids)), u[:, slot : slot + 1], [0, 0, 0])

        draft = draft_left_to_right(torch.empty(3, 1, dtype=torch.long), 4, predict)
        assert draft.shape == (3, 5)
        with pytest.raises(DataDependentOutputException):
            draft[0, 0].item()
