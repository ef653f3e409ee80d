"""Slots that run through the last layers alone, or through none: the reference text, and the drafts of training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptp_lightning.decoding import GenerationSettings, decode_autoregressively, decode_speculatively
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.decoding.partial_quadratic import decode_partially_quadratically
from ptp_lightning.evaluation.acceptance_gap import correct_tokens_at_all_positions
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.export.stored_predictor import read_predictor
from ptp_lightning.models import FullCopyStudent, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.slots.late_entry import LateEntry
from ptp_lightning.models.slots.layerless_slots import LayerlessSlots
from ptp_lightning.predictor import ParallelTokenPredictor
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_decoding import PROMPT, ForcedDraft, SlotsOfTraining, decode_one, reference
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_predictors import CORRECTIONS, OBJECTIVES, tiny_predictor
from tests.helpers.tiny_windows import make_batch, slots_that_differ, slots_that_see

VOCABULARY = 32
FAMILIES = ["llama", "qwen2", "gpt_neox"]  # the first two are run by a `JoinedDecoder`
SLOT_LAYERS = [1, 0]
HIDDEN_LAYER = ("from_window", "from_slot", "positions", "embeddings", "placeholder")
"""Of `LayerlessSlots`, and what it reads: before the weights that start at zero."""
SAMPLING = {
    "greedy": SamplingConfig(temperature=0),
    "truncated": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, order="vocabulary"),
    "full": SamplingConfig(),
}


@cache
def late(
    family: str = "llama",
    objective: str = "categorical",
    correction: str | None = "token_conditioned",
    dtype: torch.dtype = torch.float32,
    draft_vocabulary: Sequence[int] | None = None,
    slot_layers: int = 1,
) -> PredictorNetwork:
    """Three layers, of which slots run through the last or none."""
    head = None if correction is None or objective == "independent" else CORRECTIONS[correction]
    return tiny_predictor(
        family,
        objective,
        vocab_size=VOCABULARY,
        num_layers=3,
        correction=head,
        slot_layers=slot_layers,
        dtype=dtype,
        draft_vocabulary=draft_vocabulary,
    )


@one_in(
    4,
    family=[*FAMILIES, "gpt2"],
    objective=OBJECTIVES,
    correction=[None, *CORRECTIONS],
    sampling=SAMPLING,
    slot_layers=SLOT_LAYERS,
)
def test_text_is_the_reference_text(
    family: str, objective: str, correction: str | None, sampling: str, slot_layers: int
) -> None:
    if family == "gpt2" and slot_layers:
        pytest.skip("its slots cannot enter late")
    predictor = late(family, objective, correction, slot_layers=slot_layers)
    for seed, tokens in enumerate((21, 0)):
        settings = GenerationSettings(SAMPLING[sampling], 22, seed, window_length=6, num_draft_tokens=tokens)
        decoded = decode_one(decode_speculatively, predictor, settings)
        assert decoded.token_ids == reference(predictor, settings)


@pytest.mark.parametrize("slot_layers", SLOT_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_a_batch(family: str, dtype: torch.dtype, slot_layers: int) -> None:
    """Rows of other lengths, one of them a long prompt that is read in one piece, end at other times."""
    predictor = late(family, dtype=dtype, draft_vocabulary=tuple(range(0, VOCABULARY, 2)), slot_layers=slot_layers)
    prompts = [PROMPT, PROMPT * 11, [7]]
    settings = GenerationSettings(SAMPLING["truncated"], 17, (3, 4, 5), window_length=5, end_of_text=(11,))
    expected = decode_autoregressively(predictor, prompts, settings)
    found = decode_speculatively(predictor, prompts, settings)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 9, 20])
@pytest.mark.parametrize("acceptance_rate", [0.0, 0.6, 1.0])
def test_forced_drafts(max_new_tokens: int, acceptance_rate: float) -> None:
    predictor = late()
    settings = GenerationSettings(SamplingConfig(), max_new_tokens, 1, window_length=4)
    text = reference(predictor, settings)
    drafter = ForcedDraft([text], acceptance_rate, VOCABULARY)
    decoded = decode_one(decode_speculatively, predictor, settings, drafter=drafter)
    assert decoded.token_ids == text
    first, *cycles = decoded.cycles
    assert (first.num_committed, first.num_drafted) == (1, 0)
    assert all(cycle.num_committed == cycle.num_correct and cycle.num_calls == 1 for cycle in cycles)
    if acceptance_rate == 1.0:  # three drafted tokens and the pick after them
        assert decoded.num_calls == 1 + -(-(max_new_tokens - 1) // 4)
    if acceptance_rate == 0.0:
        assert decoded.num_calls == max_new_tokens


@pytest.mark.parametrize("slot_layers", SLOT_LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_slots_are_those_of_training(family: str, objective: str, slot_layers: int) -> None:
    """Whatever was drafted before: the cache, and the states that slots read, are those of the accepted tokens."""
    predictor = late(family, objective, None, slot_layers=slot_layers)
    settings = GenerationSettings(SamplingConfig(), 14, 2, window_length=5)
    tokens = reference(predictor, settings)
    compare = SlotsOfTraining(predictor, settings, tokens, VOCABULARY)
    assert decode_one(decode_speculatively, predictor, settings, drafter=compare).token_ids == tokens
    assert compare.begins == [1, 4, 7, 10]  # three tokens a cycle; the last one needs no slot


def test_drafts_at_all_positions_are_those_of_decoding() -> None:
    predictor = late()
    settings = GenerationSettings(SAMPLING["truncated"], 30, 5, window_length=4, num_draft_tokens=0)
    decoded = decode_one(decode_speculatively, predictor, settings)
    correct = correct_tokens_at_all_positions(predictor, PROMPT, decoded.token_ids, settings)
    start = 0
    for cycle in decoded.cycles[1:]:
        if cycle.num_drafted == settings.window_length and start < len(correct):
            assert correct[start] == cycle.num_correct
        start += cycle.num_committed
    assert len(set(correct)) > 1


@pytest.mark.parametrize("slot_layers", SLOT_LAYERS)
def test_both_ways_of_decoding_agree(slot_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = late(slot_layers=slot_layers)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    settings = GenerationSettings(SamplingConfig(), 12, window_length=5)
    for is_joined in (True, False):
        monkeypatch.setattr(JoinedDecoder, "is_supported", lambda model, is_joined=is_joined: is_joined)
        drafter = ForcedDraft([reference(predictor, settings)], 0.5, VOCABULARY)

        def record(logits: Tensor, *rest: Any, is_joined: bool = is_joined, drafter: ForcedDraft = drafter) -> Tensor:
            seen[is_joined].append(logits)
            return drafter(logits, *rest)

        decode_one(decode_speculatively, predictor, settings, drafter=record)
    for found, expected in zip(*seen.values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_base_model_is_untouched_and_lower_layers_carry_no_adapter() -> None:
    predictor = late()
    adapted = {name for name, _ in predictor.base_model.named_parameters() if ".lora_" in name}
    assert adapted and all("layers.2." in name for name in adapted)
    plain = tiny_predictor("llama", vocab_size=VOCABULARY, num_layers=3, correction=None)
    batch = make_batch(torch.arange(28).view(2, 14) % VOCABULARY)
    assert torch.equal(predictor.encode(batch).hidden, plain.encode(batch).hidden)
    assert len(predictor.base_model.model.layers) == 3  # also after slots have run


@pytest.mark.parametrize("slot_layers", SLOT_LAYERS)
@torch.no_grad()
def test_what_slots_see(slot_layers: int) -> None:
    """Tokens before their window, in their document; the first token of the window; and what slots carry."""
    predictor = late.__wrapped__(correction=None, slot_layers=slot_layers)  # a new one, whose weights may change
    if predictor.slot_encoder.layerless is not None:  # else slots are alike
        predictor.slot_encoder.layerless.down.weight.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.arange(28).view(2, 14) % VOCABULARY
    u = torch.rand(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(2, 3, dtype=torch.long)
    before = predictor.slot_hidden(predictor.encode(make_batch(ids)), u, first)
    for position in (0, 5, 6, 9):
        changed = ids.clone()
        changed[0, position] += 1
        after = predictor.slot_hidden(predictor.encode(make_batch(changed % VOCABULARY)), u, first)
        assert slots_that_differ(before, after) == slots_that_see(0, position, 7)
    other = first.clone()
    other[0, 1] = 3
    after = predictor.slot_hidden(predictor.encode(make_batch(ids)), u, other)
    assert slots_that_differ(before, after) == {(0, 1, slot) for slot in range(7)}
    later = u.clone()
    later[0, 1, 4] = 0.5  # which slot 4 carries as that of the token it stands for
    changed_slots = slots_that_differ(before, predictor.slot_hidden(predictor.encode(make_batch(ids)), later, first))
    if slot_layers:  # slots see the slots before them
        assert changed_slots <= {(0, 1, slot) for slot in range(3, 7)} and (0, 1, 6) in changed_slots
    else:
        assert changed_slots == {(0, 1, 4)}


def test_entry_by_hand() -> None:
    """Two dimensions; the window's part is the first of three inputs alone, the slot's part the slot itself."""
    entry = LateEntry(hidden_size=2)
    with torch.no_grad():
        entry.from_window.weight.zero_()
        entry.from_window.weight[0, 4] = 1.0  # the first number of the token's embedding
        entry.from_slot.weight.copy_(torch.eye(2))
    slots = torch.tensor([[[3.0, 4.0]]])
    found = entry(slots, torch.tensor([[6.0, 8.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]]))
    scale = 50**0.5  # of (6, 8)
    expected = scale * (
        torch.tensor([6.0, 8.0]) / scale + torch.tensor([1.0, 0.0]) + torch.tensor([3.0, 4.0]) / 12.5**0.5
    )
    torch.testing.assert_close(found[0, 0], expected)


def test_layerless_slots_leave_the_base_model_as_it_is() -> None:
    predictor = late(slot_layers=0)
    plain = TINY_MODELS["llama"](vocab_size=VOCABULARY, num_layers=3)
    assert [name for name, _ in predictor.base_model.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert not any(one.requires_grad for one in predictor.base_model.parameters())


def test_layerless_slots_by_hand() -> None:
    """Two dimensions: the direct part is the token's embedding, and slot 1 adds silu(position) to the first number."""
    make = LayerlessSlots(hidden_size=2, num_slots=2)
    with torch.no_grad():
        for weight in make.parameters():
            weight.zero_()
        make.gain.copy_(torch.tensor([1.0, 2.0]))
        make.from_window.weight[4:, 2:] = torch.eye(2)  # after the four numbers of the MLP
        make.positions[1, 0] = 3.0
        make.down.weight[0, 0] = 1.0
    slots = torch.ones(1, 3, 2)
    found = make(slots, torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, -1.0]]))
    scale = 17**0.5  # of (3, 5)
    second = 1.0 + 3.0 / (1 + math.exp(-3.0))
    norm = ((second**2 + 1) / 2) ** 0.5
    expected = torch.tensor([[1.0, -2.0], [second / norm, -2.0 / norm], [second / norm, -2.0 / norm]])
    torch.testing.assert_close(found[0], scale * expected)


def test_layerless_slots_draft_no_further_than_in_training() -> None:
    predictor = late(slot_layers=0)  # windows of 8
    for length, drafted in ((2, 2), (8, 8), (20, 8)):
        settings = GenerationSettings(SamplingConfig(), 24, window_length=length, num_draft_tokens=0)
        decoded = decode_one(decode_speculatively, predictor, settings)
        assert decoded.token_ids == reference(predictor, settings)
        assert max(cycle.num_drafted for cycle in decoded.cycles) == drafted


@pytest.mark.parametrize("slot_layers", SLOT_LAYERS)
def test_gradients_reach_all_trained_weights(slot_layers: int) -> None:
    predictor = late(slot_layers=slot_layers).train()
    batch = make_batch(torch.arange(28).view(2, 14) % VOCABULARY)
    u = torch.rand(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = predictor.slot_hidden(predictor.encode(batch), u, torch.ones(2, 3, dtype=torch.long))
    tokens = torch.randint(VOCABULARY, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    logits = predictor.slot_logits(predictor.correct(predictor.encode(batch), None, hidden, tokens))
    F.cross_entropy(logits.flatten(0, 2), tokens.flatten()).backward()
    missing = [name for name, one in predictor.named_parameters() if one.requires_grad and not one.grad.abs().sum() > 0]  # pyright: ignore[reportOptionalMemberAccess]
    predictor.zero_grad(set_to_none=True)
    predictor.eval()
    assert not [name for name in missing if not (slot_layers == 0 and any(part in name for part in HIDDEN_LAYER))]


@pytest.mark.parametrize("slot_layers", SLOT_LAYERS)
def test_saved_and_opened_again(slot_layers: int, tmp_path: Path) -> None:
    predictor = late(slot_layers=slot_layers)
    ParallelTokenPredictor(predictor).save_pretrained(tmp_path / "late")
    other = tiny_predictor(
        "llama",
        vocab_size=VOCABULARY,
        num_layers=3,
        correction=CORRECTIONS["token_conditioned"],
        slot_layers=slot_layers,
        seed=9,
    )
    stored = read_predictor(tmp_path / "late")
    assert PredictorConfig.from_dict(stored.config).slot_layers == slot_layers
    assert (tmp_path / "late" / "adapter_model.safetensors").exists() == (slot_layers > 0)
    other.load_trainable_state(stored.state)
    settings = GenerationSettings(SamplingConfig(), 20)
    cycles = [decode_one(decode_speculatively, one, settings).cycles for one in (predictor, other)]
    assert cycles[0] == cycles[1]


def test_all_layers_are_the_default() -> None:
    predictor = tiny_predictor("llama", num_layers=2, slot_layers=2)
    assert predictor.first_slot_layer == 0 and predictor.slot_encoder.late_entry is None
    decode_one(decode_partially_quadratically, predictor, GenerationSettings(max_new_tokens=3))


class TestRefusals:
    def test_other_decoder(self) -> None:
        with pytest.raises(ValueError, match=r"slot_layers 1: set decoder to speculative"):
            decode_one(decode_partially_quadratically, late(), GenerationSettings())

    def test_too_few(self) -> None:
        with pytest.raises(ValueError, match=r"predictor\.slot_layers null or >= 0, found -1"):
            PredictorConfig(slot_layers=-1)

    def test_a_longer_window_than_was_stored(self, tmp_path: Path) -> None:
        ParallelTokenPredictor(late(slot_layers=0)).save_pretrained(tmp_path / "late")
        file = tmp_path / "late" / "predictor.json"
        about = json.loads(file.read_text())
        about["config"]["window_length"] = 4000
        file.write_text(json.dumps(about))
        with pytest.raises(ValueError, match=r"predictor\.window_length as in the stored weights, 8, found 4000"):
            load_network(tmp_path / "late")

    def test_too_many(self) -> None:
        with pytest.raises(ValueError, match=r"predictor\.slot_layers null or <= 3 \(all layers\), found 4"):
            tiny_predictor("llama", num_layers=3, slot_layers=4)

    def test_another_student(self) -> None:
        with pytest.raises(ValueError, match=r"predictor\.student GatedLoraStudent.*found FullCopyStudent"):
            PredictorConfig(slot_layers=2, student=FullCopyStudent())

    def test_other_layers(self) -> None:
        with pytest.raises(ValueError, match=r"one list of equal ones.*found gpt2: set predictor\.slot_layers to null"):
            tiny_predictor("gpt2", num_layers=3, slot_layers=1)

    def test_no_adapter_in_these_layers(self) -> None:
        config = PredictorConfig(slot_layers=1, lora=LoraSettings(target_modules=r".*layers\.0\..*q_proj"))
        with pytest.raises(ValueError, match=r"target_modules in the last layers.*set predictor\.slot_layers to null"):
            PredictorNetwork(config, TINY_MODELS["llama"](num_layers=3))
