"""Training for many sampling settings: each batch draws its own, and validation tells them apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.losses import AcceptedLengthWeights, Loss
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.sampling import Sampler, SamplingConfig
from ptp_lightning.training.modules.distillation import DistillationModule, sampling_label
from ptp_lightning.training.optimization import OptimizerSettings, configure
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSource
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import by_objective, make_module, make_trainer, record_losses, weights

RANGE = SamplingRange(0.5, 1.5, greedy_probability=0.3, top_k=(4, 8), top_p=(0.8, 0.9))
USUAL = SamplingConfig(temperature=0.8, top_k=8, top_p=0.9)


def test_muon_trains_the_sampling_encoders() -> None:
    """Their names must not contain that of an embedding, which AdamW trains."""
    module = make_module(sampling_range=RANGE)
    chosen: Any = configure(OptimizerSettings("muon"), module.predictor.named_parameters(), total_steps=10)
    muon = {id(parameter) for parameter in chosen["optimizer"].optimizers[0].param_groups[0]["params"]}
    trained = {name for name, parameter in module.predictor.named_parameters() if id(parameter) in muon}
    for encoder in ("sampling_encoder", "correction_sampling_encoder"):
        assert {f"slot_encoder.{encoder}.inner.weight", f"slot_encoder.{encoder}.outer.weight"} <= trained


def record_settings(module: DistillationModule) -> list[SamplingConfig]:
    """A list that every encoded batch adds its settings to."""
    seen: list[SamplingConfig] = []
    encode = module._encode

    def remember(*arguments: Any) -> Any:
        context = encode(*arguments)
        seen.append(context.sampling.settings)
        return context

    module._encode = remember
    return seen


class TestTraining:
    @by_objective
    @pytest.mark.parametrize("source", [TeacherWindows(), DatasetWindows()], ids=["teacher", "dataset"])
    def test_learns_in_every_objective(
        self, tmp_path: Path, objective: Objective, loss: Loss, source: WindowSource
    ) -> None:
        wide = SamplingRange(0.5, 1.5, 0.1, top_k=(None, 24), top_p=(1.0,))  # with room for any text
        usual = SamplingConfig(top_k=24)
        module = make_module(objective=objective, loss=loss, source=source, sampling=usual, sampling_range=wide)
        before, losses = weights(module), record_losses(module)
        make_trainer(tmp_path, max_steps=5, limit_val_batches=0).fit(module, datamodule=tiny_data())
        changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
        assert len(losses) == 5 and all(torch.tensor(losses).isfinite())
        for name in ("sampling_encoder", "correction_sampling_encoder"):
            assert f"slot_encoder.{name}.outer.weight" in changed

    def test_every_batch_draws_and_the_same_run_draws_the_same(self, tmp_path: Path) -> None:
        runs = []
        for _ in range(2):
            module = make_module(sampling_range=RANGE)
            settings, losses = record_settings(module), record_losses(module)
            make_trainer(tmp_path, max_steps=12, limit_val_batches=0).fit(module, datamodule=tiny_data())
            runs.append((settings, losses))
        assert runs[0] == runs[1]
        assert len(runs[0][0]) == 12
        assert {config.temperature == 0 for config in runs[0][0]} == {True, False}
        assert len({config.temperature for config in runs[0][0]}) > 5
        assert all(RANGE.covers(config) for config in runs[0][0])

    def test_micro_batches_and_ranks_draw_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = make_module(sampling_range=RANGE)
        module._trainer = None
        settings = []
        for rank, micro_batch in product((0, 1), repeat=2):
            monkeypatch.setattr(type(module), "global_rank", rank)
            monkeypatch.setattr(type(module), "micro_batch", micro_batch)
            settings.append(module._training_settings())
        assert len(set(settings)) == 4

    def test_without_a_range_all_batches_have_the_usual_settings(self, tmp_path: Path) -> None:
        module = make_module()
        settings = record_settings(module)
        make_trainer(tmp_path, limit_val_batches=0).fit(module, datamodule=tiny_data())
        assert settings == [USUAL] * 2

    @pytest.mark.parametrize(
        "source", [TeacherWindows(), DatasetWindows(), StudentWindows()], ids=["teacher", "dataset", "student"]
    )
    def test_sources_sample_with_the_settings_of_the_batch(self, source: WindowSource) -> None:
        """Greedy settings: the teacher's tokens are its most likely ones, whatever the usual settings are."""
        module = make_module(sampling_range=RANGE)
        batch = next(iter(tiny_data().train_dataloader()))
        context = module._encode(batch, replace(USUAL, temperature=0.0))
        sample = source.sample(module.predictor, context, torch.Generator().manual_seed(0))
        assert (
            sample.teacher.materialize().probabilities.shape[-1]
            == sample.target.materialize().probabilities.shape[-1]
            == 1
        )
        first = module.predictor.logits(context.first_hidden).argmax(-1)
        valid = sample.mask[..., 0]
        assert torch.equal(sample.token_ids[..., 0][valid], first[valid])

    def test_weights_of_positions_are_measured_with_the_settings_of_the_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = make_module(sampling_range=RANGE, position_weights=AcceptedLengthWeights())
        objective = type(module.predictor.config.objective)
        original, measured = objective.correct_probability, []

        def watch(self: Objective, logits: Tensor, tokens: Tensor, teacher: Any, sampling: Sampler) -> Tensor:
            measured.append(sampling.settings)
            return original(self, logits, tokens, teacher, sampling)

        monkeypatch.setattr(objective, "correct_probability", watch)
        settings = record_settings(module)
        make_trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(module, datamodule=tiny_data())
        assert list(dict.fromkeys(measured)) == settings and USUAL not in settings


class TestValidation:
    SETTINGS = (SamplingConfig(0.0, 8, 0.9), SamplingConfig(0.5, 8, 0.9), SamplingConfig(1.2, 4, 0.8))
    LABELS = ("temperature_0.00", "temperature_0.50", "temperature_1.20_top_k_4_top_p_0.8")

    def test_each_setting_is_measured_as_if_it_were_the_usual_one(self, tmp_path: Path) -> None:
        module = make_module(sampling_range=SamplingRange(0.3, 1.5, 0.1, (4, 8), (0.8, 0.9)))
        state = {name: torch.randn(value.shape) * 0.2 for name, value in module.predictor.trainable_state().items()}
        found = self.validate(tmp_path, state, USUAL, self.SETTINGS)
        plain = self.validate(tmp_path, state, USUAL, ())
        assert {tag: found[tag] for tag in plain} == plain
        for label, sampling in zip(self.LABELS, self.SETTINGS, strict=True):
            alone = self.validate(tmp_path, state, sampling, ())
            for name in ("val/correct_tokens", "val/correct_tokens_standard_error"):
                assert found[f"{name}/{label}"] == pytest.approx(alone[name]), (name, label)
        assert len({found[f"val/correct_tokens/{label}"] for label in self.LABELS}) > 1

    def validate(
        self, folder: Path, state: dict[str, Tensor], usual: SamplingConfig, further: tuple[SamplingConfig, ...]
    ) -> dict[str, float]:
        module = make_module(
            sampling=usual, sampling_range=SamplingRange(0.3, 1.5, 0.1, (4, 8), (0.8, 0.9)), val_sampling=further
        )
        module.predictor.load_trainable_state(state)
        trainer = make_trainer(folder, limit_val_batches=1.0)
        return dict(trainer.validate(module, datamodule=tiny_data(eval_rows=8), verbose=False)[0])

    def test_labels(self) -> None:
        assert tuple(sampling_label(sampling, USUAL) for sampling in self.SETTINGS) == self.LABELS

    def test_the_same_settings_twice_are_refused(self) -> None:
        with pytest.raises(ValueError, match="different settings in model.init_args.val_sampling"):
            make_module(val_sampling=(USUAL, USUAL))

    def test_their_order_is_the_usual_one(self) -> None:
        module = make_module(sampling=replace(USUAL, order="embedding"), val_sampling=(SamplingConfig(0.5),))
        assert [sampling.order for sampling in module.val_sampling.values()] == ["embedding"]


def test_greedy_windows_tell_slots_the_u_that_decoding_tells() -> None:
    module = make_module(sampling_range=RANGE)
    batch = next(iter(tiny_data().train_dataloader()))
    context = module._encode(batch, replace(USUAL, temperature=0.0))
    sample = TeacherWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    hook = module.predictor.slot_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module.predictor.slot_hidden(context, sample.auxiliaries)
    hook.remove()
    assert seen[0].unique().tolist() == [0.5]
