"""Students: what is trained, which network says what, and how gradients flow through the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.models import DecoderRefiner, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.backbone import architecture_fingerprint, fingerprint
from ptp_lightning.testing import check_student
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_predictors import STUDENTS, tiny_predictor
from tests.helpers.tiny_windows import DOCUMENT_IDS, WINDOW_STARTS, make_batch, slots_that_differ, slots_that_see

LENGTH = 4


def make(student: str, family: str = "llama", **config: Any) -> PredictorNetwork:
    """As it is at the start of training, in float64."""
    torch.manual_seed(1)
    config = {"lora": LoraSettings(rank=2), "window_length": LENGTH, "student": STUDENTS[student]} | config
    return PredictorNetwork(PredictorConfig(**config), TINY_MODELS[family]()).double().eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(64, DOCUMENT_IDS.shape, generator=generator)
    return input_ids, torch.rand(*WINDOW_STARTS.shape, LENGTH, generator=generator, dtype=torch.float64)


def slot_hidden(predictor: PredictorNetwork, input_ids: Tensor, auxiliaries: Tensor) -> Tensor:
    return predictor.slot_hidden(predictor.encode(make_batch(input_ids)), auxiliaries)


@pytest.mark.parametrize("student", STUDENTS)
def test_contract(student: str) -> None:
    check_student(STUDENTS[student])


@pytest.mark.parametrize("family", TINY_MODELS)
@pytest.mark.parametrize("student", ["full_copy", "shared"])
class TestFreshStudents:
    def test_slots_are_those_of_an_untrained_adapter(self, family: str, student: str) -> None:
        """A copy that still has the base model's weights says what the base model says, in another order of calls."""
        predictor, adapter = make(student, family), make("gated_lora", family)
        adapter.slot_encoder.load_state_dict(predictor.slot_encoder.state_dict())
        with torch.no_grad():
            found, expected = (slot_hidden(each, *inputs()) for each in (predictor, adapter))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)  # rotary angles are float32
            torch.testing.assert_close(predictor.slot_logits(found), adapter.logits(found))

    def test_a_slot_sees_the_context_before_its_window(self, family: str, student: str) -> None:
        predictor = make(student, family)
        input_ids, auxiliaries = inputs()
        with torch.no_grad():
            before = slot_hidden(predictor, input_ids, auxiliaries)
            for row, position in [(row, position) for row in range(2) for position in range(input_ids.shape[1])]:
                changed = input_ids.clone()
                changed[row, position] = (changed[row, position] + 1) % 64
                after = slot_hidden(predictor, changed, auxiliaries)
                assert slots_that_differ(before, after) == slots_that_see(row, position, LENGTH - 1), (row, position)

    def test_every_weight_of_the_student_gets_a_gradient(self, family: str, student: str) -> None:
        predictor = make(student, family)
        predictor.slot_logits(slot_hidden(predictor, *inputs())).square().sum().backward()
        with_gradient = {name for name, weight in predictor.named_parameters() if weight.grad is not None}
        assert with_gradient == {name for name, weight in predictor.named_parameters() if weight.requires_grad}
        network = "student_copy." if student == "full_copy" else "language_model."
        assert {name for name, _ in predictor.named_parameters() if name.startswith(network)} < with_gradient

    def test_gradient_reaches_the_context(self, family: str, student: str) -> None:
        """Through the tokens' embeddings: of the tokens that some window sees, and of no others."""
        predictor = make(student, family)
        input_ids = torch.arange(28).reshape(2, 14)  # each token once
        slots = predictor.slot_logits(slot_hidden(predictor, input_ids, inputs()[1]))
        table = predictor.student_model.get_input_embeddings().weight
        tied = predictor.student_model.get_output_embeddings().weight is table
        (gradient,) = torch.autograd.grad(slots[0, 0].square().sum(), table)
        if not tied:
            assert gradient.any(-1).nonzero().flatten().tolist() == [0, 1]  # the window starts at position 2


class TestCopy:
    def test_base_and_copy_are_apart(self) -> None:
        predictor = make("full_copy")
        hidden = torch.randn(1, 32, dtype=torch.float64)
        before = predictor.logits(hidden), fingerprint(predictor.base_model)
        with torch.no_grad():
            for weight in predictor.student_model.parameters():
                weight.add_(0.1)
        assert torch.equal(predictor.logits(hidden), before[0]) and fingerprint(predictor.base_model) == before[1]
        assert not torch.allclose(predictor.slot_logits(hidden), before[0])
        assert not any(weight.requires_grad for weight in predictor.base_model.parameters())

    def test_tied_heads_stay_tied(self) -> None:
        copy = make("full_copy", "gpt2").student_model
        assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_state_is_the_copy_and_the_slot_encoder(self, family: str) -> None:
        predictor, other = make("full_copy", family), make("full_copy", family)
        state = predictor.trainable_state()
        assert {name.partition(".")[0] for name in state} == {"student_copy", "slot_encoder"}
        with torch.no_grad():
            for weight in predictor.trainable_state().values():
                weight.normal_()
        other.load_trainable_state(predictor.trainable_state())
        with torch.no_grad():
            assert torch.equal(slot_hidden(other, *inputs()), slot_hidden(predictor, *inputs()))

    def test_dropout_acts_on_the_copy_and_never_on_the_teacher(self) -> None:
        torch.manual_seed(0)
        base = TINY_MODELS["gpt2"]()  # dropout 0.1
        predictor = PredictorNetwork(PredictorConfig(window_length=4, student=STUDENTS["full_copy"]), base)
        assert predictor.student_model.training and not predictor.base_model.training
        input_ids, auxiliaries = inputs()
        with torch.no_grad():
            contexts = [predictor.encode(make_batch(input_ids)) for _ in range(2)]
            assert torch.equal(contexts[0].hidden, contexts[1].hidden)
            slots = [predictor.slot_hidden(contexts[0], auxiliaries) for _ in range(2)]
        assert not torch.equal(*slots)


class TestShared:
    def test_no_dropout(self) -> None:
        predictor = PredictorNetwork(
            PredictorConfig(window_length=4, student=STUDENTS["shared"]), TINY_MODELS["gpt2"]()
        )
        assert predictor.training and not any(module.training for module in predictor.base_model.modules())

    def test_weights_that_are_trained_identify_nothing(self) -> None:
        first, second = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
        with torch.no_grad():
            next(second.parameters()).add_(1)
        assert fingerprint(first) != fingerprint(second)
        config = PredictorConfig(student=STUDENTS["shared"])
        expected = architecture_fingerprint(first)
        found = [PredictorNetwork(config, model).base_fingerprint for model in (first, second)]
        assert found == [expected, expected]
        assert architecture_fingerprint(TINY_MODELS["llama"](hidden_size=64)) != expected


@pytest.mark.parametrize("student", ["full_copy", "shared"])
def test_refined_slots_depend_on_the_draft(student: str) -> None:
    predictor = tiny_predictor(student=student)
    input_ids, auxiliaries = inputs()
    draft = torch.zeros(2, 3, LENGTH - 1, dtype=torch.long)
    with torch.no_grad():
        context = predictor.encode(make_batch(input_ids))
        hidden, pairs = predictor.slot_hidden(context, auxiliaries), predictor.correction_context(context)
        first, second = (predictor.correct(context, pairs, hidden, each) for each in (draft, draft + 1))
    assert first.shape == hidden.shape and not torch.equal(first, second)


@pytest.mark.parametrize("student", STUDENTS)
def test_configuration_there_and_back(student: str) -> None:
    config = PredictorConfig(student=STUDENTS[student], correction=DecoderRefiner(num_layers=1))
    assert PredictorConfig.from_dict(config.to_dict()) == config
    older = {key: value for key, value in config.to_dict().items() if key != "student"}
    assert PredictorConfig.from_dict(older).student == STUDENTS["gated_lora"]
