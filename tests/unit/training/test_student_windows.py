"""On-policy windows: the targets are the teacher's picks along the student's text, in one parallel pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.losses import CrossEntropy, KullbackLeibler
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.windows.student_draft import student_draft
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSample
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import PAIRS, make_module, make_trainer
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_predictors import OBJECTIVES, sharpen, tiny_predictor
from tests.unit.training.test_windows import WINDOW_STARTS, make_batch

VOCAB_SIZE, LENGTH, SHARPNESS = 30, 5, 2.0
SAMPLING = SamplingConfig(temperature=0.8, top_k=12, top_p=0.9)


def make_predictor(
    family: str = "llama", objective: str = "categorical", sampling: SamplingConfig = SAMPLING
) -> PredictorNetwork:
    """An untrained student with a refiner, which is wrong more often than correct."""
    return tiny_predictor(family, objective, sampling, window_length=LENGTH, sharpness=SHARPNESS, vocab_size=VOCAB_SIZE)


def sample(predictor: PredictorNetwork, end_of_text: int | None = None, source: Any = None) -> WindowSample:
    context = predictor.encode(make_batch(), end_of_text=end_of_text)
    return (source or StudentWindows()).sample(predictor, context, torch.Generator().manual_seed(0))


def every_window() -> list[tuple[int, int]]:
    return [(row, window) for row in range(2) for window in range(3)]


class TestTargets:
    @pytest.mark.parametrize("family", TINY_MODELS)
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("sampling", [SAMPLING, SamplingConfig()], ids=["truncated", "full"])
    def test_are_the_teachers_picks_along_the_students_text(
        self, family: str, objective: str, sampling: SamplingConfig
    ) -> None:
        """Window by window and token by token, without a cache, a mask or an adapter."""
        predictor = make_predictor(family, objective, sampling)
        found, batch = sample(predictor), make_batch()
        base = TINY_MODELS[family](vocab_size=VOCAB_SIZE)
        sharpen(base, SHARPNESS)
        assert torch.equal(found.auxiliaries, draw_auxiliaries((2, 3, LENGTH), torch.Generator().manual_seed(0), "cpu"))
        disagreements = 0
        for row, window in every_window():
            start = int(WINDOW_STARTS[row, window])
            begin = start - 1 - int(batch.position_ids[row, start - 1])
            text = batch.input_ids[row, begin:start].tolist()
            for position in range(LENGTH):
                with torch.no_grad():
                    logits = base(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                Q = sampling.distribution(logits)
                here = (row, window, position)
                assert int(found.token_ids[here]) == int(pick(found.auxiliaries[here], Q)), here
                torch.testing.assert_close(
                    found.teacher.materialize().probabilities[here], Q.probabilities, atol=1e-5, rtol=1e-4
                )
                target = sampling.target().distribution(logits).probabilities
                torch.testing.assert_close(found.target.materialize().probabilities[here], target, atol=1e-5, rtol=1e-4)
                text.append(int(found.conditioning_ids[here]))  # the student's, correct or wrong
                disagreements += text[-1] != int(found.token_ids[here])
        assert disagreements > 5, "nothing to tell the student's text from the teacher's"
        assert torch.equal(found.conditioning_ids[..., 0], found.token_ids[..., 0])
        assert found.mask.all()

    def test_the_text_is_what_the_student_drafts(self) -> None:
        predictor = make_predictor()
        found, batch = sample(predictor), make_batch()
        draft = student_draft(predictor, predictor.encode(batch), found.auxiliaries, found.token_ids[..., 0]).token_ids
        assert torch.equal(found.conditioning_ids, draft)

    def test_window_ends_with_the_students_end_of_text(self) -> None:
        free = sample(make_predictor())
        # A token that the student writes in the middle of a window, where the teacher would not.
        middle = (free.conditioning_ids != free.token_ids)[..., 1:-1].nonzero()[0]
        end_of_text = int(free.conditioning_ids[middle[0], middle[1], middle[2] + 1])
        found = sample(make_predictor(), end_of_text)
        assert torch.equal(found.token_ids, free.token_ids)
        for row, window in every_window():
            tokens = found.conditioning_ids[row, window].tolist()
            length = tokens.index(end_of_text) + 1 if end_of_text in tokens else LENGTH
            assert found.mask[row, window].tolist() == [True] * length + [False] * (LENGTH - length)
        assert not found.mask.all()


class TestCost:
    def test_one_call_of_the_student_and_one_of_the_base(self, monkeypatch: pytest.MonkeyPatch) -> None:
        predictor, batch = make_predictor(), make_batch()
        context = predictor.encode(batch)
        calls: list[tuple[bool, list[int]]] = []
        for name in ("run_decoder", "run_student_decoder"):
            decode = getattr(predictor, name)

            def count(embeddings: Tensor, *arguments: Any, decode: Any = decode, **named: Any) -> Tensor:
                calls.append((predictor.gate.state is not None, list(embeddings.shape[:2])))
                return decode(embeddings, *arguments, **named)

            monkeypatch.setattr(predictor, name, count)
        StudentWindows().sample(predictor, context, torch.Generator().manual_seed(0))
        tokens = [2, 3 * (LENGTH - 1)]
        assert calls == [(True, tokens), (False, tokens)]


class TestAPerfectStudent:
    """With the teacher in place of the student, its windows are the teacher's own."""

    @pytest.fixture
    def predictor(self, monkeypatch: pytest.MonkeyPatch) -> PredictorNetwork:
        predictor = make_predictor(sampling=SamplingConfig())

        @torch.no_grad()
        def slot_hidden(context: Context, auxiliaries: Tensor, first_token_ids: Tensor) -> Tensor:
            """Writes the teacher's text token by token, and hands out the states that predict it."""
            text: list[Tensor] = []
            hidden = context.first_hidden.unsqueeze(2)
            for position in range(LENGTH - 1):
                Q = SamplingConfig().distribution(predictor.logits(hidden[:, :, -1]))
                text.append(pick(auxiliaries[..., position], Q))
                with predictor.gate.closed():
                    embeddings = predictor.embed(torch.stack(text, -1))
                    hidden = predictor.read_windows(context, embeddings)
            return hidden

        monkeypatch.setattr(predictor, "slot_hidden", slot_hidden)
        monkeypatch.setattr(predictor, "correct", lambda context, pairs, hidden, token_ids: hidden)
        return predictor

    def test_writes_the_teachers_windows(self, predictor: PredictorNetwork) -> None:
        own, teachers = sample(predictor), sample(predictor, source=TeacherWindows())
        assert torch.equal(own.conditioning_ids, own.token_ids)
        for name in ("token_ids", "auxiliaries", "mask", "conditioning_ids"):
            assert torch.equal(getattr(own, name), getattr(teachers, name)), name
        for name in ("teacher", "target"):
            found, expected = (getattr(entry, name).materialize().probabilities for entry in (own, teachers))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)

    def test_ends_where_the_teachers_windows_end(self, predictor: PredictorNetwork) -> None:
        end_of_text = int(sample(predictor).token_ids[0, 0, 1])
        own, teachers = (sample(predictor, end_of_text, source) for source in (None, TeacherWindows()))
        assert torch.equal(own.mask, teachers.mask) and not own.mask.all()


class TestTraining:
    def test_refined_slots_are_conditioned_on_the_students_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = make_module()
        batch = next(iter(tiny_data().train_dataloader()))
        context = module._encode(batch)
        found = StudentWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))
        assert not torch.equal(found.conditioning_ids, found.token_ids)
        conditioned_on: list[Tensor] = []

        def refine(context: Context, pairs: Any, hidden: Tensor, token_ids: Tensor) -> Tensor:
            conditioned_on.append(token_ids)
            return hidden

        monkeypatch.setattr(module.predictor, "correct", refine)
        module._corrected_loss(context, torch.zeros(2, 3, 3, 16), found)
        assert len(conditioned_on) == 1 and torch.equal(conditioned_on[0], found.conditioning_ids[..., :-1])

    @pytest.mark.parametrize(("objective", "_"), PAIRS, ids=[pair[0].name for pair in PAIRS])
    def test_every_objective_trains_on_its_own_text(self, tmp_path: Path, objective: Objective, _: Any) -> None:
        loss = CrossEntropy() if objective.name == "one_hot" else KullbackLeibler()
        module = make_module(objective=objective, loss=loss, source=StudentWindows())
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(module, datamodule=tiny_data())
        assert float(trainer.callback_metrics["train/loss_nats"]) > 0
