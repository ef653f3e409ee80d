"""The layers after the stack: what an untrained one does, which tokens a slot hears of, and what rounds settle."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ptp_lightning.models import DecoderRefiner, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.correction.decoder_refiner import Refiner
from ptp_lightning.models.correction.draft_order import refine_draft
from ptp_lightning.models.slots.objectives import (
    CategoricalObjective,
    IndependentObjective,
    Objective,
    OneHotObjective,
    SequentialObjective,
)
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_windows import (
    DOCUMENT_IDS,
    POSITION_IDS,
    WINDOW_STARTS,
    make_batch,
    one_document,
    slots_that_differ,
    slots_that_see,
)

VOCAB_SIZE, WINDOW_LENGTH = 64, 4


TOLD: list[Objective] = [CategoricalObjective(), OneHotObjective(), SequentialObjective()]
NOT_TOLD: list[Objective] = [IndependentObjective()]


@cache
def make_predictor(
    family: str = "llama",
    objective: Objective = TOLD[0],
    trained: bool = True,
) -> PredictorNetwork:
    torch.manual_seed(1)
    config = PredictorConfig(
        objective=objective,
        lora=LoraSettings(rank=4),
        window_length=WINDOW_LENGTH,
        correction=DecoderRefiner(num_layers=2),
    )
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=VOCAB_SIZE)).double().eval()
    if trained:
        for name, parameter in predictor.named_parameters():
            if ("lora_B" in name or "correction" in name) and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return predictor


@cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids `[B, S]`, auxiliaries `[B, N, L]` and the tokens `[B, N, L - 1]` that slots stand for."""
    generator = torch.Generator().manual_seed(0)
    shape = (*WINDOW_STARTS.shape, WINDOW_LENGTH)
    input_ids = torch.randint(VOCAB_SIZE, DOCUMENT_IDS.shape, generator=generator)
    auxiliaries = torch.rand(shape, generator=generator, dtype=torch.float64)
    return input_ids, auxiliaries, torch.randint(VOCAB_SIZE, shape, generator=generator)[..., :-1]


@torch.no_grad()
def refined(predictor: PredictorNetwork, input_ids: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    context = predictor.encode(make_batch(input_ids))
    return predictor.correct(context, predictor.correction_context(context), hidden, tokens)


@torch.no_grad()
def slot_hidden(predictor: PredictorNetwork) -> Tensor:
    input_ids, auxiliaries, _ = inputs()
    context = predictor.encode(make_batch(input_ids))
    return predictor.slot_hidden(context, auxiliaries)


@pytest.mark.parametrize("family", TINY_MODELS)
class TestWhatASlotHears:
    def test_nothing_before_training(self, family: str) -> None:
        predictor = make_predictor(family, trained=False)
        input_ids, _, tokens = inputs()
        hidden = slot_hidden(predictor)
        assert torch.equal(refined(predictor, input_ids, hidden, tokens), hidden)

    def test_tokens_of_its_own_window_up_to_its_own(self, family: str) -> None:
        predictor = make_predictor(family)
        input_ids, _, tokens = inputs()
        hidden = slot_hidden(predictor)
        before = refined(predictor, input_ids, hidden, tokens)
        assert not torch.equal(before, hidden)
        for row, window in [(0, 0), (0, 1), (0, 2), (1, 1)]:
            for place in range(WINDOW_LENGTH - 1):
                changed = tokens.clone()
                changed[row, window, place] = (changed[row, window, place] + 1) % VOCAB_SIZE
                after = refined(predictor, input_ids, hidden, changed)
                expected = {(row, window, slot) for slot in range(place, WINDOW_LENGTH - 1)}
                assert slots_that_differ(before, after) == expected, (row, window, place)

    def test_the_context_before_its_window_alone(self, family: str) -> None:
        predictor = make_predictor(family)
        input_ids, _, tokens = inputs()
        hidden = slot_hidden(predictor)  # as it was, so that only the refiner's own view of the context is tested
        before = refined(predictor, input_ids, hidden, tokens)
        for row, place in [(row, place) for row in range(2) for place in range(input_ids.shape[1])]:
            changed = input_ids.clone()
            changed[row, place] = (changed[row, place] + 1) % VOCAB_SIZE
            after = refined(predictor, changed, hidden, tokens)
            expected = slots_that_see(row, place, WINDOW_LENGTH - 1)
            assert slots_that_differ(before, after) == expected, (row, place)

    def test_the_same_as_in_a_window_of_its_own(self, family: str) -> None:
        """One row, one window, nothing but its context, hence no packing, no other window and no padding."""
        predictor = make_predictor(family)
        input_ids, auxiliaries, tokens = inputs()
        packed = refined(predictor, input_ids, slot_hidden(predictor), tokens)
        for row, window in [(row, window) for row in range(2) for window in range(WINDOW_STARTS.shape[1])]:
            start = int(WINDOW_STARTS[row, window])
            length = int(POSITION_IDS[row, start - 1]) + 1  # tokens of the context
            own_input_ids = input_ids[row : row + 1, start - length : start]
            with torch.no_grad():
                context = predictor.encode(one_document(own_input_ids, torch.tensor([[length]])))
                hidden = predictor.slot_hidden(context, auxiliaries[row, window].view(1, 1, -1))
                single = predictor.correct(
                    context, predictor.correction_context(context), hidden, tokens[row, window].view(1, 1, -1)
                )
            # Other shapes, other kernels, and rotary angles in single precision: equal up to rounding.
            torch.testing.assert_close(packed[row, window], single[0, 0], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_distances_count_and_places_do_not() -> None:
    refiner = make_predictor().refiner
    assert refiner is not None
    generator = torch.Generator().manual_seed(0)
    hidden, tokens = torch.randn(2, 1, 6, 32, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()

    def at(position_ids: Tensor) -> Tensor:
        return refiner(hidden, tokens, position_ids.unsqueeze(0), mask, DynamicCache())

    here, there, wider = at(torch.arange(6)), at(torch.arange(6) + 40), at(torch.arange(6) * 2)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert (here[:, 2:] - wider[:, 2:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("objective", [*TOLD, *NOT_TOLD], ids=str)
def test_who_is_told_the_draft(objective: Objective) -> None:
    predictor = make_predictor(objective=objective)
    input_ids, _, tokens = inputs()
    hidden = slot_hidden(predictor)
    before, after = (refined(predictor, input_ids, hidden, each) for each in (tokens, (tokens + 1) % VOCAB_SIZE))
    assert torch.equal(before, after) == (objective in NOT_TOLD)
    assert predictor.num_refinement_steps == (1 if objective in NOT_TOLD else 3)


def test_without_a_correction_there_are_no_steps() -> None:
    predictor = PredictorNetwork(PredictorConfig(lora=LoraSettings(rank=2)), TINY_MODELS["llama"]())
    assert predictor.correction is None and predictor.refiner is None and predictor.num_refinement_steps == 0


def test_asking_twice_changes_nothing() -> None:
    predictor = make_predictor()
    input_ids, _, tokens = inputs()
    hidden = slot_hidden(predictor)
    with torch.no_grad():
        context = predictor.encode(make_batch(input_ids))
        pairs = predictor.correction_context(context)
        first, second = (predictor.correct(context, pairs, hidden, tokens) for _ in range(2))
    assert torch.equal(first, second)


class TestRounds:
    """The next token is the sum of all before it: a rule that one parallel proposal gets wrong behind a mistake."""

    DRAFT = torch.tensor([[1, 9, 9, 9, 9]])

    @staticmethod
    def predict(known: Tensor) -> Tensor:
        return known.cumsum(-1)

    @pytest.mark.parametrize(
        ("num_refinement_steps", "expected"),
        [
            (0, [1, 9, 9, 9, 9]),
            (1, [1, 1, 10, 19, 28]),
            (2, [1, 1, 2, 12, 31]),
            (4, [1, 1, 2, 4, 8]),
        ],
    )
    def test_each_settles_one_token_more(self, num_refinement_steps: int, expected: list[int]) -> None:
        assert refine_draft(self.DRAFT, num_refinement_steps, self.predict).tolist() == [expected]

    def test_no_more_than_there_are_tokens_to_settle(self) -> None:
        calls: list[Tensor] = []

        def count(known: Tensor) -> Tensor:
            calls.append(known)
            return self.predict(known)

        assert refine_draft(self.DRAFT, 100, count).tolist() == [[1, 1, 2, 4, 8]]
        assert len(calls) == 4


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "minimum"),
        [("num_layers", 1), ("intermediate_size", 1), ("num_refinement_steps", 1)],
    )
    def test_sizes_out_of_range(self, key: str, minimum: int) -> None:
        values: dict[str, Any] = {key: minimum - 1}
        with pytest.raises(ValueError, match=f"predictor.correction.init_args.{key} >= {minimum}, found {minimum - 1}"):
            DecoderRefiner(**values)

    def test_heads_of_odd_width(self) -> None:
        with pytest.raises(ValueError, match="found 15 and 3: set predictor.correction to null"):
            Refiner(GPT2LMHeadModel(GPT2Config(n_embd=15, n_head=3, n_layer=1, vocab_size=8)), DecoderRefiner())
