"""What a slot may see: masks against loops over integers, and logits of tiny models of every family.

Where something must not matter, logits are compared with `torch.equal`: the shapes are the same on both sides, and a
masked key has weight exactly 0 in the softmax.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.masks import context_mask, slot_mask
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.continuous_features import CosineFeatures
from ptp_lightning.models.slots.objectives import CategoricalObjective, IndependentObjective, OneHotObjective
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

WINDOW_LENGTH = 4
VOCAB_SIZE = 64
OBJECTIVES = {chosen.name: chosen for chosen in (OneHotObjective(), CategoricalObjective(), IndependentObjective())}


@cache
def make_predictor(family: str, objective: str = "categorical", hidden_size: int = 32) -> PredictorNetwork:
    """A predictor whose adapter is not at its initial zero."""
    torch.manual_seed(1)
    config = PredictorConfig(
        objective=OBJECTIVES[objective],
        features=CosineFeatures(8),
        lora=LoraSettings(rank=4),
        window_length=WINDOW_LENGTH,
    )
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=VOCAB_SIZE, hidden_size=hidden_size)).eval()
    for name, parameter in predictor.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return predictor


@cache
def inputs() -> tuple[Tensor, Tensor]:
    """Token ids `[B, S]` and auxiliaries `[B, N, L]`."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(VOCAB_SIZE, DOCUMENT_IDS.shape, generator=generator)
    return input_ids, torch.rand(*WINDOW_STARTS.shape, WINDOW_LENGTH, generator=generator, dtype=torch.float64)


@torch.no_grad()
def slot_logits(predictor: PredictorNetwork, input_ids: Tensor, auxiliaries: Tensor) -> Tensor:
    """`[B, N, L - 1, V]`."""
    context = predictor.encode(make_batch(input_ids))
    return predictor.logits(predictor.slot_hidden(context, auxiliaries))


class TestMasks:
    DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0], [3, 1, 1, 2, 2, 2, 1]])

    def test_context_mask_by_a_loop(self) -> None:
        mask = context_mask(self.DOCUMENTS)
        assert mask.shape == (3, 1, 7, 7) and mask.dtype == torch.bool
        for row, document in enumerate(self.DOCUMENTS.tolist()):
            for query in range(7):
                for key in range(7):
                    sees = key <= query and document[key] == document[query]
                    assert bool(mask[row, 0, query, key]) == sees, (row, query, key)

    def test_context_mask_written_out(self) -> None:
        assert context_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0].int().tolist() == [
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 1],
        ]

    def test_slot_mask_written_out(self) -> None:
        # Row: 0 0 0 | 1 1; the windows start at index 1 and at index 4, each with two slots.
        window, offset = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        mask = slot_mask(
            torch.tensor([[0, 0, 0, 1, 1]]),
            torch.tensor([[1, 4]]),
            query_window=window,
            query_offset=offset,
            key_window=window,
            key_offset=offset,
        )
        assert mask[0, 0].int().tolist() == [
            # 5 context tokens, then 2 slots of each window
            [1, 0, 0, 0, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 0, 0, 0, 1, 0],
            [0, 0, 0, 1, 0, 0, 0, 1, 1],
        ]

    @pytest.mark.parametrize("order", ["window after window", "step after step", "one step of a rollout"])
    def test_slot_mask_by_a_loop(self, order: str) -> None:
        starts = torch.tensor([[1, 3, 5], [1, 4, 6], [2, 2, 5]])
        num_windows, slots = 3, 3
        key_window = torch.arange(num_windows).repeat_interleave(slots)
        key_offset = torch.arange(slots).repeat(num_windows)
        if order != "window after window":
            key_window = torch.arange(num_windows).repeat(slots)
            key_offset = torch.arange(slots).repeat_interleave(num_windows)
        query_window, query_offset = key_window, key_offset
        if order == "one step of a rollout":
            query_window, query_offset = torch.arange(num_windows), torch.full((num_windows,), slots - 1)

        mask = slot_mask(
            self.DOCUMENTS,
            starts,
            query_window=query_window,
            query_offset=query_offset,
            key_window=key_window,
            key_offset=key_offset,
        )

        assert mask.shape == (3, 1, len(query_window), 7 + len(key_window))
        for row, document in enumerate(self.DOCUMENTS.tolist()):
            for query, (window, offset) in enumerate(zip(query_window.tolist(), query_offset.tolist(), strict=True)):
                start = int(starts[row, window])
                for key in range(7):
                    sees = key < start and document[key] == document[start - 1]
                    assert bool(mask[row, 0, query, key]) == sees, (row, query, key)
                for key, (other, place) in enumerate(zip(key_window.tolist(), key_offset.tolist(), strict=True)):
                    assert bool(mask[row, 0, query, 7 + key]) == (other == window and place <= offset)


@pytest.mark.parametrize("family", TINY_MODELS)
class TestWhatASlotSees:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_auxiliaries(self, family: str, objective: str) -> None:
        """Slot j carries u_j (one-hot: u_{j+1} too), so u_k reaches its own window's slots from k (k - 1) on, alone."""
        predictor = make_predictor(family, objective)
        input_ids, auxiliaries = inputs()
        before = slot_logits(predictor, input_ids, auxiliaries)
        for row, window in [(0, 0), (0, 1), (0, 2), (1, 1)]:
            for place in range(WINDOW_LENGTH):
                changed = auxiliaries.clone()
                changed[row, window, place] = (changed[row, window, place] + 0.37) % 1
                after = slot_logits(predictor, input_ids, changed)
                first = {"one_hot": max(place - 1, 0), "categorical": place, "independent": WINDOW_LENGTH}[objective]
                expected = {(row, window, slot) for slot in range(first, WINDOW_LENGTH - 1)}
                assert slots_that_differ(before, after) == expected, (row, window, place)

    def test_context(self, family: str) -> None:
        """A token reaches the slots of those windows alone that start later in its own document."""
        predictor = make_predictor(family)
        input_ids, auxiliaries = inputs()
        before = slot_logits(predictor, input_ids, auxiliaries)
        for row, place in [(row, place) for row in range(2) for place in range(input_ids.shape[1])]:
            changed = input_ids.clone()
            changed[row, place] = (changed[row, place] + 1) % VOCAB_SIZE
            after = slot_logits(predictor, changed, auxiliaries)
            expected = slots_that_see(row, place, WINDOW_LENGTH - 1)
            assert slots_that_differ(before, after) == expected, (row, place)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equal_to_a_loop_over_single_windows(self, family: str, objective: str) -> None:
        """One row, one window, nothing but its context, hence no packing, no other window and no padding."""
        # In double precision, because the large adapter amplifies rounding.
        predictor = make_predictor(family, objective).double()
        input_ids, auxiliaries = inputs()
        packed = slot_logits(predictor, input_ids, auxiliaries)
        for row, window in [(row, window) for row in range(2) for window in range(WINDOW_STARTS.shape[1])]:
            start = int(WINDOW_STARTS[row, window])
            length = int(POSITION_IDS[row, start - 1]) + 1  # tokens of the context
            with torch.no_grad():
                own_input_ids = input_ids[row : row + 1, start - length : start]
                context = predictor.encode(one_document(own_input_ids, torch.tensor([[length]])))
                hidden = predictor.slot_hidden(context, auxiliaries[row, window].view(1, 1, -1))
                single = predictor.logits(hidden)[0, 0]
            # Other shapes, other kernels: equal up to rounding.
            torch.testing.assert_close(packed[row, window], single, atol=2e-5, rtol=2e-5)

    def test_closed_gate_reproduces_the_teacher(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Slots fed the true tokens' embeddings are the teacher, at every position of every document."""
        predictor = make_predictor(family)
        monkeypatch.setattr(predictor.gate, "open", predictor.gate.closed)
        input_ids, _ = inputs()
        slots = WINDOW_LENGTH - 1
        teacher = TINY_MODELS[family](vocab_size=VOCAB_SIZE)
        for row, begin, end in [(0, 0, 6), (0, 6, 13), (1, 0, 14)]:  # the documents
            # A window at every place from which all tokens that its slots stand for lie in the document.
            starts = torch.arange(begin + 1, end - slots + 1).unsqueeze(0)
            stands_for = starts.unsqueeze(-1) + torch.arange(slots)  # [1, N, L - 1]
            true_embeddings = predictor.embed(input_ids[row, stands_for]).detach()
            monkeypatch.setattr(predictor.slot_encoder, "forward", lambda *_, embeddings=true_embeddings: embeddings)
            with torch.no_grad():
                own_row = PackedBatch(*(tensor[row : row + 1] for tensor in make_batch(input_ids)))
                context = predictor.encode(own_row._replace(window_starts=starts))
                unused = torch.zeros(1, starts.shape[1], WINDOW_LENGTH, dtype=torch.float64)
                found = predictor.logits(predictor.slot_hidden(context, unused))
                first = predictor.logits(context.first_hidden)
                expected = teacher(input_ids=input_ids[row : row + 1, begin:end], use_cache=False).logits[0]
            # Other shapes, other kernels: equal up to rounding.
            torch.testing.assert_close(found, expected[stands_for - begin], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(first, expected[starts - begin - 1], atol=2e-5, rtol=2e-5)
            assert set(stands_for.flatten().tolist()) == set(range(begin + 1, end)), "some position was not tested"

    def test_cache_is_as_before(self, family: str) -> None:
        predictor = make_predictor(family)
        input_ids, auxiliaries = inputs()
        context = predictor.encode(make_batch(input_ids))
        keys = [layer.keys.clone() for layer in context.cache.layers]
        with torch.no_grad():
            first = predictor.slot_hidden(context, auxiliaries)
            again = predictor.slot_hidden(context, auxiliaries)
        assert torch.equal(first, again)
        assert context.cache.get_seq_length() == input_ids.shape[1]
        assert all(torch.equal(layer.keys, kept) for layer, kept in zip(context.cache.layers, keys, strict=True))
