"""What the student drafts and what it says of given tokens, against its own logits written out."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick, token_interval
from ptp_lightning.models.context import Context
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.students import FullCopyStudent, GatedLoraStudent, Student
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.windows import chunks
from ptp_lightning.training.windows.student_draft import student_draft
from ptp_lightning.training.windows.student_probe import student_probe
from ptp_lightning.training.windows.teacher_distributions import distributions_along
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import PAIRS, make_module

OBJECTIVES = {objective.name: (objective, loss) for objective, loss in PAIRS}


class Windows(NamedTuple):
    module: DistillationModule
    context: Context
    auxiliaries: Tensor
    """`[2, 3, 4]`"""
    token_ids: Tensor
    """Likely tokens, some of which the student drafts."""


def windows(
    objective: str,
    refiner: bool = True,
    dropout: float = 0.0,
    student: Student = GatedLoraStudent(),  # noqa: B008  frozen
) -> Windows:
    """A student whose adapter and refiner say something."""
    chosen, loss = OBJECTIVES[objective]
    module = make_module(
        objective=chosen,
        loss=loss,
        lora=LoraSettings(rank=2, dropout=dropout),
        correction=DecoderRefiner(intermediate_size=16, num_refinement_steps=2) if refiner else None,
        student=student,
    )
    with torch.no_grad():
        for parameter in module.predictor.parameters():
            if parameter.requires_grad:  # a copy leaves its teacher, its head included
                parameter += 0.3 * torch.randn_like(parameter)
    context = module._encode(next(iter(tiny_data().train_dataloader())))
    generator = torch.Generator().manual_seed(0)
    auxiliaries = draw_auxiliaries((2, 3, 4), generator, "cpu")
    with torch.no_grad():
        likely = module.predictor.slot_logits(module.predictor.slot_hidden(context, auxiliaries)).topk(2).indices
    side = torch.randint(2, (2, 3, 3, 1), generator=generator)
    first = torch.randint(32, (2, 3, 1), generator=generator)
    return Windows(module, context, auxiliaries, torch.cat([first, likely.gather(-1, side).squeeze(-1)], dim=-1))


@torch.no_grad()
def logits_conditioned_on(case: Windows, token_ids: Tensor | None) -> Tensor:
    """Of the slots `[2, 3, 3, V]`; refined if tokens are given."""
    predictor = case.module.predictor
    hidden = predictor.slot_hidden(case.context, case.auxiliaries)
    if token_ids is not None:
        pairs = predictor.correction_context(case.context)
        hidden = predictor.correct(case.context, pairs, hidden, token_ids[..., :-1])
    return predictor.slot_logits(hidden).float()


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestPropose:
    def test_round_after_round(self, objective: str) -> None:
        case = windows(objective)
        config = case.module.predictor.config
        first = torch.full((2, 3), 7)
        draft: Tensor | None = None
        # Once without the refiner and two refinement steps with it; one step if it is not conditioned on the draft.
        for _ in range(3 if config.objective.conditions_on_draft else 2):
            logits = logits_conditioned_on(case, draft)
            drafted = config.objective.tokens_from_logits(logits, case.auxiliaries[..., 1:], case.context.sampling)
            draft = torch.cat([first.unsqueeze(-1), drafted], dim=-1)
        found = student_draft(case.module.predictor, case.context, case.auxiliaries, first)
        assert draft is not None and torch.equal(found.token_ids, draft)
        torch.testing.assert_close(case.module.predictor.slot_logits(found.hidden).float(), logits)
        assert not found.hidden.requires_grad

    @pytest.mark.parametrize("student", [GatedLoraStudent(), FullCopyStudent()], ids=lambda student: student.name)
    def test_without_a_refiner(self, objective: str, student: Student) -> None:
        case = windows(objective, refiner=False, student=student)
        config = case.module.predictor.config
        found = student_draft(case.module.predictor, case.context, case.auxiliaries, torch.full((2, 3), 7))
        logits = logits_conditioned_on(case, None)
        drafted = config.objective.tokens_from_logits(logits, case.auxiliaries[..., 1:], case.context.sampling)
        assert torch.equal(found.token_ids[..., 1:], drafted) and (found.token_ids[..., 0] == 7).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("refiner", [False, True])
class TestProbe:
    @pytest.mark.parametrize("student", [GatedLoraStudent(), FullCopyStudent()], ids=lambda student: student.name)
    def test_correct_is_what_is_drafted(self, objective: str, refiner: bool, student: Student) -> None:
        """By a refiner that is conditioned on the given tokens."""
        case = windows(objective, refiner, student=student)
        config = case.module.predictor.config
        logits = logits_conditioned_on(case, case.token_ids if refiner else None)
        drafted = config.objective.tokens_from_logits(logits, case.auxiliaries[..., 1:], case.context.sampling)
        correct = student_probe(case.module.predictor, case.context, case.token_ids)(case.auxiliaries).correct
        assert correct[..., 0].all()
        assert torch.equal(correct[..., 1:], drafted == case.token_ids[..., 1:])

    def test_interval_is_where_it_would_be_correct(self, objective: str, refiner: bool) -> None:
        case = windows(objective, refiner)
        sampling = case.module.predictor.config.sampling
        interval = student_probe(case.module.predictor, case.context, case.token_ids)(case.auxiliaries).interval
        if objective == "one_hot":
            assert interval is None
            return
        assert interval is not None
        lower, upper = interval
        assert (lower[..., 0] == 0).all() and (upper[..., 0] == 1).all()  # the first token needs no student
        P = sampling.for_student().distribution(logits_conditioned_on(case, case.token_ids if refiner else None))
        has_interval = lower[..., 1:] < upper[..., 1:]
        assert has_interval.any()
        for u in (lower, torch.nextafter(upper, lower)):
            assert torch.equal((pick(u[..., 1:], P) == case.token_ids[..., 1:]) & has_interval, has_interval)
        torch.testing.assert_close(token_interval(P, case.token_ids[..., 1:]), (lower[..., 1:], upper[..., 1:]))


class TestChunks:
    @pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.8, top_k=8, top_p=0.9)])
    def test_do_not_change_results(self, monkeypatch: pytest.MonkeyPatch, sampling: SamplingConfig) -> None:
        case = windows("categorical")
        predictor = case.module.predictor
        predictor.config = type(predictor.config)(**{**vars(predictor.config), "sampling": sampling})
        found: list[list[Tensor]] = []
        for size in (1024, 5):
            monkeypatch.setattr(chunks, "CHUNK_SLOTS", size)
            draft = student_draft(predictor, case.context, case.auxiliaries, torch.full((2, 3), 7))
            answer = student_probe(predictor, case.context, case.token_ids)(case.auxiliaries)
            along = distributions_along(predictor, case.context, case.token_ids)
            assert answer.interval is not None
            listed = [entry.token_ids for entry in along if entry.token_ids is not None]
            found.append([draft.token_ids, *answer.interval, *(entry.probabilities for entry in along), *listed])
        for whole, parts in zip(*found, strict=True):
            torch.testing.assert_close(whole, parts)


class TestDropout:
    def test_is_off_while_the_student_is_asked(self) -> None:
        case = windows("categorical", dropout=0.5)
        predictor = case.module.predictor.train()
        drafts = [student_draft(predictor, case.context, case.auxiliaries, torch.full((2, 3), 7)) for _ in range(2)]
        assert torch.equal(drafts[0].hidden, drafts[1].hidden)
        probe = student_probe(predictor, case.context, case.token_ids)
        first, second = (probe(case.auxiliaries).interval for _ in range(2))
        assert first is not None and second is not None and torch.equal(first[1], second[1])
        assert predictor.training
        dropouts = [module for name, module in predictor.named_modules() if name.endswith("lora_dropout")]
        assert dropouts and all(module.training for module in dropouts)
