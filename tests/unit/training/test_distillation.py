"""DistillationModule with tiny models: what it trains, and what a validation says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.export.stored_predictor import read_predictor
from ptp_lightning.losses import KullbackLeibler, Loss
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.context import Context
from ptp_lightning.models.correction.correction import Correction
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner, RefinerContext
from ptp_lightning.models.correction.markov_head import MarkovHead
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.objectives import Objective, OneHotObjective
from ptp_lightning.models.students import FullCopyStudent
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import GPT2, LLAMA, by_objective, make_module, make_trainer, record_losses, weights


class ShortWindows(TeacherWindows):
    """The teacher's windows, each of a length that is drawn for it."""

    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        sample = super().sample(predictor, context, generator)
        num_windows, length = sample.mask[..., 0].numel(), sample.mask.shape[-1]
        lengths = torch.randint(1, length + 1, (num_windows,), generator=generator).view(*sample.mask.shape[:-1], 1)
        return sample._replace(mask=sample.mask & (torch.arange(length) < lengths))


class TestTraining:
    @by_objective
    def test_adapter_and_slot_encoder_change_and_nothing_else(
        self, tmp_path: Path, objective: Objective, loss: Loss
    ) -> None:
        module = make_module(objective=objective, loss=loss)
        before = weights(module)
        make_trainer(tmp_path, max_steps=3).fit(module, datamodule=tiny_data())
        after = weights(module)
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        expected = {name for name in before if ".lora_" in name or name.startswith("slot_encoder.")}
        assert changed == expected
        assert {name for name, parameter in module.predictor.named_parameters() if parameter.requires_grad} == expected

    @by_objective
    def test_the_whole_copy_changes_and_the_teacher_does_not(
        self, tmp_path: Path, objective: Objective, loss: Loss
    ) -> None:
        module = make_module(GPT2, objective=objective, loss=loss, student=FullCopyStudent())
        before = weights(module)
        make_trainer(tmp_path, max_steps=3).fit(module, datamodule=tiny_data())
        changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.startswith(("student_copy.", "slot_encoder."))}

    def test_every_optimised_parameter_gets_a_gradient(self, tmp_path: Path) -> None:
        module = make_module()
        gradients: dict[str, bool] = {}

        def remember(*_: Any) -> None:
            gradients.update({name: p.grad is not None for name, p in module.predictor.named_parameters()})

        module.on_before_optimizer_step = remember
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=tiny_data())
        trained = {name for name, parameter in module.predictor.named_parameters() if parameter.requires_grad}
        assert {name for name, has_gradient in gradients.items() if has_gradient} == trained

    def test_loss_falls_along_the_gradient(self, tmp_path: Path) -> None:
        """On one and the same sample a small step down the gradient must lower the divergence."""
        module = make_module()
        data = tiny_data()
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)  # lora_B leaves 0
        batch = next(iter(data.train_dataloader()))
        context = module._encode(batch)
        sample = TeacherWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))

        def nats() -> Tensor:
            hidden = module.predictor.slot_hidden(context, sample.auxiliaries)
            total, count = module._slot_loss(hidden, sample, module.predictor.sampler())
            return total / count

        before = nats()
        module.zero_grad()
        before.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        assert float(nats().detach()) < float(before.detach())

    @pytest.mark.parametrize("clip", [None, 1e-3])
    def test_the_gradient_norm_is_that_before_clipping(self, clip: float | None, tmp_path: Path) -> None:
        changes, norms = [], []
        for gradient_clip_val in (None, clip):
            module = make_module()
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            before = torch.cat([parameter.detach().flatten().clone() for parameter in trained])
            module.configure_optimizers = lambda trained=trained: torch.optim.SGD(trained, lr=1.0)
            trainer = make_trainer(tmp_path, max_steps=1, gradient_clip_val=gradient_clip_val)
            trainer.fit(module, datamodule=tiny_data())
            after = torch.cat([parameter.detach().flatten() for parameter in trained])
            changes.append(float((after - before).norm()))
            norms.append(float(trainer.callback_metrics["train/gradient_norm"]))
        assert norms == [pytest.approx(changes[0], rel=1e-3)] * 2
        assert changes[1] == pytest.approx(clip or changes[0], rel=1e-2)

    def test_no_gradient_where_the_student_is_the_teacher(self) -> None:
        module = make_module(sampling=SamplingConfig())
        hidden = torch.randn(2, 3, 3, 16, requires_grad=True)
        context = module._encode(next(iter(tiny_data().train_dataloader())))
        sample = TeacherWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))
        logits = module.predictor.logits(torch.cat([hidden[:, :, :1], hidden], dim=2)).detach()
        same = sample._replace(target=SamplingConfig().distribution(logits))

        total, count = module._slot_loss(hidden, same, module.predictor.sampler())
        total.backward()

        assert float(total.detach()) == 0.0 and float(count) == 2 * 3 * 3
        assert hidden.grad is not None
        torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), atol=1e-6, rtol=0)
        # The same slots against the teacher's real distributions are not at the optimum.
        other, _ = module._slot_loss(hidden, sample, module.predictor.sampler())
        assert float(other.detach()) > 0

    def test_masked_slots_do_not_count(self) -> None:
        module = make_module()
        context = module._encode(next(iter(tiny_data().train_dataloader())))
        sample = TeacherWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))
        mask = sample.mask.clone()
        mask[0, 0, 2:] = False
        mask[1, 1] = False
        hidden = module.predictor.slot_hidden(context, sample.auxiliaries)
        masked = sample._replace(mask=mask)
        _, count = module._slot_loss(hidden, masked, module.predictor.sampler())
        assert float(count) == 2 * 3 * 3 - 2 - 3

    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
    def test_a_weight_that_cannot_train_is_refused(self, weight: float) -> None:
        predictor = PredictorConfig(backbone=BackboneSettings(from_config=LLAMA))
        with pytest.raises(ValueError, match="first_pass_loss_weight >= 0, found"):
            DistillationModule(predictor, first_pass_loss_weight=weight)

    def test_refined_slots_are_conditioned_on_the_true_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And what they then say is compared with the token after."""
        module = make_module()
        context = module._encode(next(iter(tiny_data().train_dataloader())))
        sample = TeacherWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))
        monkeypatch.setattr(module.predictor, "correct", teacher_in_place_of_the_refiner(module))
        hidden = torch.full((2, 3, 3, 16), torch.nan)  # whatever the slots say, the teacher does not listen
        # Before the temperature and without truncation, the teacher is its own optimum.
        plain = SamplingConfig().distribution(module.predictor.logits(true_hidden(module, context, sample)))
        loss = module._corrected_loss(context, hidden, sample._replace(target=plain))
        assert float(loss.total) == pytest.approx(0, abs=1e-4) and float(loss.count) == 2 * 3 * 3
        earlier = sample._replace(conditioning_ids=sample.token_ids.roll(1, dims=-1), target=plain)
        assert float(module._corrected_loss(context, hidden, earlier).total) > 1

    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_weight_of_the_first_pass(self, tmp_path: Path, weight: float) -> None:
        module = make_module()
        module.first_pass_loss_weight = weight
        losses = record_losses(module)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(module, datamodule=tiny_data())
        logged = trainer.callback_metrics
        total = logged["train/loss_nats"] + weight * logged["train/first_pass_loss_nats"]
        assert losses == [pytest.approx(float(total), rel=1e-6)]

    def test_the_same_auxiliaries_in_the_same_step(self, tmp_path: Path) -> None:
        losses: list[list[float]] = []
        for _ in range(2):
            trainer = make_trainer(tmp_path, max_steps=3)
            module = make_module()
            losses.append(record_losses(module))
            trainer.fit(module, datamodule=tiny_data())
        assert losses[0] == losses[1] and len(set(losses[0])) == 3


class TestObjectives:
    def slot_logits(self, module: DistillationModule, auxiliaries: Tensor) -> Tensor:
        batch = next(iter(tiny_data().train_dataloader()))
        return module.predictor.logits(module.predictor.slot_hidden(module._encode(batch), auxiliaries)).detach()

    @by_objective
    def test_only_the_baselines_ignore_u(self, objective: Objective, loss: Loss) -> None:
        module = make_module(objective=objective, loss=loss)
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        ignores = torch.equal(self.slot_logits(module, first), self.slot_logits(module, second))
        assert ignores == (objective.name in ("independent", "sequential"))

    def test_unsound_loss_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not a sound loss for the one_hot objective.*loss"):
            make_module(objective=OneHotObjective(), loss=KullbackLeibler())


class TestEvalModeOfTheBase:
    """Dropout of the base model (GPT-2: 0.1) would blur the teacher; LoRA's own dropout is training's business."""

    def modes(self, module: DistillationModule) -> dict[str, bool]:
        return {name: child.training for name, child in module.predictor.language_model.named_modules()}

    @pytest.mark.parametrize("mode", [True, False])
    def test_train_reaches_lora_dropout_only(self, mode: bool) -> None:
        module = make_module(GPT2, lora=LoraSettings(rank=2, dropout=0.5)).train(mode)
        assert module.predictor.slot_encoder.training == mode
        in_train_mode = {name for name, training in self.modes(module).items() if training}
        dropouts = {name for name in self.modes(module) if "lora_dropout" in name}
        assert in_train_mode == (dropouts if mode else set()) and dropouts

    def test_during_fit(self, tmp_path: Path) -> None:
        module = make_module(GPT2, lora=LoraSettings(rank=2, dropout=0.5))
        seen: list[dict[str, bool]] = []
        module.on_train_batch_start = lambda *_: seen.append(self.modes(module))
        options = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(tmp_path, **options).fit(module, datamodule=tiny_data())
        assert not [entry for entry in caught if "eval mode" in str(entry.message)]
        for modes in seen:  # before and after a validation
            assert {name for name, training in modes.items() if training} == {n for n in modes if "lora_dropout" in n}
        assert len(seen) == 4

    def test_the_teacher_is_deterministic_and_the_student_drops_out(self) -> None:
        module = make_module(GPT2, lora=LoraSettings(rank=2, dropout=0.5)).train()
        for name, parameter in module.predictor.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        batch = next(iter(tiny_data().train_dataloader()))
        first, second = (module._encode(batch).hidden for _ in range(2))
        assert torch.equal(first, second)
        auxiliaries = torch.full((2, 3, 4), 0.3, dtype=torch.float64)
        dropped = [module.predictor.slot_hidden(module._encode(batch), auxiliaries) for _ in range(2)]
        assert not torch.equal(*dropped)


class TestValidation:
    @by_objective
    @pytest.mark.parametrize("source", [TeacherWindows(), DatasetWindows()], ids=["teacher", "dataset"])
    def test_the_first_token_is_exact(
        self, tmp_path: Path, objective: Objective, loss: Loss, source: WindowSource
    ) -> None:
        module = make_module(objective=objective, loss=loss, source=source)
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        trainer.fit(module, datamodule=tiny_data())
        metrics = trainer.validate(module, datamodule=tiny_data(eval_rows=8), verbose=False)[0]
        assert metrics["val/accuracy/position_00"] == 1.0
        assert 1.0 <= metrics["val/correct_tokens"] <= 4.0
        assert module.val_summary is not None and int(module.val_summary.prefix_counts[0]) == 0

    def test_perplexity_of_the_first_token_is_the_teachers(self, tmp_path: Path) -> None:
        module = make_module()
        make_trainer(tmp_path).validate(module, datamodule=tiny_data(eval_rows=2), verbose=False)
        batch = next(iter(tiny_data(eval_rows=2).val_dataloader()))
        assert module.end_of_text == 0
        context = module._encode(batch)
        generator = keyed_generator(module.seed, "val", 0, 0)
        sample = TeacherWindows().sample(module.predictor, context, generator)
        probability = sample.teacher.materialize().probability_of(sample.token_ids)[..., 0].double()
        assert module.val_summary is not None
        assert float(module.val_summary.perplexity[0]) == pytest.approx(float((-probability.log()).mean().exp()))

    @pytest.mark.parametrize(
        "correction", [DecoderRefiner(num_layers=1, intermediate_size=16), MarkovHead(rank=2), None]
    )
    def test_the_loss_of_training_over_all_slots(self, correction: Correction | None, tmp_path: Path) -> None:
        module = make_module(source=ShortWindows(), correction=correction)
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        trainer.validate(module, datamodule=tiny_data(), verbose=False)
        nats, slots = [], []
        for number, batch in enumerate(tiny_data().val_dataloader()):
            context = module._encode(batch)
            sample = ShortWindows().sample(module.predictor, context, keyed_generator(module.seed, "val", 0, number))
            hidden = module.predictor.slot_hidden(context, sample.auxiliaries, sample.conditioning_ids[..., 0])
            if correction is None:
                loss = module._slot_loss(hidden, sample, context.sampling)
            else:
                loss = module._corrected_loss(context, hidden, sample)
            nats.append(float(loss.total.detach()))
            slots.append(float(loss.count))
        assert len(set(slots)) > 1  # so that a mean over batches would be another number
        assert float(trainer.callback_metrics["val/loss_nats"]) == pytest.approx(sum(nats) / sum(slots), rel=1e-5)

    def test_a_checkpoint_knows_how_long_drafts_were_correct(self, tmp_path: Path) -> None:
        module, trainer = make_module(), make_trainer(tmp_path, limit_val_batches=1.0)
        trainer.fit(module, datamodule=tiny_data())
        path = tmp_path / "run.ckpt"
        module.val_summary = None
        trainer.save_checkpoint(path)
        assert read_predictor(path).training == {"steps": trainer.global_step}
        trainer.validate(module, datamodule=tiny_data(), verbose=False)
        trainer.save_checkpoint(path)
        assert module.val_summary is not None and int(module.val_summary.num_windows) > 0
        expected = module.val_summary.prefix_counts.tolist()
        assert read_predictor(path).training == {"steps": trainer.global_step, "prefix_counts": expected}

    def test_validation_draws_the_same_every_time(self, tmp_path: Path) -> None:
        module, trainer = make_module(), make_trainer(tmp_path, limit_val_batches=1.0)
        first, second = (trainer.validate(module, datamodule=tiny_data(), verbose=False) for _ in range(2))
        assert first == second

    def test_without_any_window_there_is_nothing_to_log(self, tmp_path: Path) -> None:
        class NoWindows(TeacherWindows):
            def sample(self, *arguments: Any, **named: Any) -> WindowSample:
                sample = super().sample(*arguments, **named)
                return sample._replace(mask=torch.zeros_like(sample.mask))

        module = make_module(source=NoWindows())
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(module, datamodule=tiny_data())  # its gradients are zeros
        assert float(trainer.callback_metrics["train/loss_nats"]) == 0.0
        assert trainer.validate(module, datamodule=tiny_data(), verbose=False) == [{}]

    def test_test_loop_has_its_own_tags(self, tmp_path: Path) -> None:
        metrics = make_trainer(tmp_path).test(make_module(), datamodule=tiny_data(), verbose=False)[0]
        assert metrics["test/accuracy/position_00"] == 1.0
        assert "test/correct_tokens" in metrics

    @pytest.mark.parametrize("num_refinement_steps", [1, 2, 3])
    def test_each_round_settles_a_token(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_refinement_steps: int
    ) -> None:
        """With the teacher in place of the refiner, a token is correct once all tokens before it are."""
        module = make_module(
            sampling=SamplingConfig(),
            correction=DecoderRefiner(num_layers=1, num_refinement_steps=num_refinement_steps),
        )
        monkeypatch.setattr(module.predictor, "correct", teacher_in_place_of_the_refiner(module))
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        metrics = trainer.validate(module, datamodule=tiny_data(eval_rows=8), verbose=False)[0]
        correct = [metrics[f"val/accuracy_given_prefix/position_{position:02d}"] == 1.0 for position in range(4)]
        assert correct == [position <= num_refinement_steps for position in range(4)]


def teacher_in_place_of_the_refiner(module: DistillationModule) -> Any:
    """Reads the tokens it is conditioned on after the context, as the base model does."""

    @torch.no_grad()
    def refine(context: Context, pairs: RefinerContext, hidden: Tensor, token_ids: Tensor) -> Tensor:
        predictor = module.predictor
        with predictor.gate.closed():
            return predictor.read_windows(context, predictor.embed(token_ids))

    return refine


def true_hidden(module: DistillationModule, context: Context, sample: WindowSample) -> Tensor:
    """`[B, N, L, H]`, the base model's last hidden states that predict the windows' tokens."""
    first = context.first_hidden.unsqueeze(2)
    known = sample.token_ids[..., :-1]
    rest = first.new_empty(*known.shape, first.shape[-1])
    later = teacher_in_place_of_the_refiner(module)(context, None, rest, known)
    return torch.cat([first, later], dim=2)
