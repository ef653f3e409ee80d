"""DistillationModule: what it refuses, at the start or when it meets a checkpoint that is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptp_lightning.losses import Loss
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.slots.objectives import IndependentObjective, Objective
from ptp_lightning.models.slots.stepped_features import BinaryFeatures
from ptp_lightning.models.students import FullCopyStudent, SharedStudent
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import GPT2, LLAMA, by_objective, make_module, make_trainer, weights


class TestRefusals:
    def test_window_longer_than_the_row(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="predictor.window_length 13 > data.row_length 12"):
            make_trainer(tmp_path).fit(make_module(source=DatasetWindows(), window_length=13), datamodule=tiny_data())

    def test_sampled_windows_may_leave_the_row(self, tmp_path: Path) -> None:
        make_trainer(tmp_path).fit(make_module(source=TeacherWindows(), window_length=13), datamodule=tiny_data())

    def test_tokenizer_larger_than_the_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at most 20 token ids.*found 29.*data.tokenizer"):
            make_trainer(tmp_path).fit(make_module(LLAMA | {"vocab_size": 20}), datamodule=tiny_data())

    def test_row_longer_than_the_models_positions(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="<= 32 .*found 29 \\+ 4: lower data.row_length"):
            make_trainer(tmp_path).fit(make_module(GPT2), datamodule=tiny_data(row_length=29))

    def test_no_limit_of_steps(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trainer.max_steps"):
            make_trainer(tmp_path, max_steps=-1, max_epochs=1).fit(make_module(), datamodule=tiny_data())

    def test_nan_in_the_base_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ptp_lightning.models import network as predictor

        load = predictor.load_backbone

        def broken(settings: BackboneSettings) -> Any:
            model = load(settings)
            with torch.no_grad():
                next(model.parameters())[0] = torch.nan
            return model

        monkeypatch.setattr(predictor, "load_backbone", broken)
        with pytest.raises(ValueError, match="NaN.*predictor.backbone.path"):
            make_module()

    def test_a_teacher_that_would_be_trained(self) -> None:
        with pytest.raises(ValueError, match="frozen teacher, found SharedStudent.*predictor.student"):
            make_module(student=SharedStudent())

    @by_objective
    def test_nan_in_the_adapter(self, tmp_path: Path, objective: Objective, loss: Loss) -> None:
        module = make_module(objective=objective, loss=loss)
        with torch.no_grad():
            module.predictor.slot_encoder.placeholder.fill_(torch.nan)
        with pytest.raises(ValueError, match="finite"):
            make_trainer(tmp_path).fit(module, datamodule=tiny_data())
        with pytest.raises(ValueError, match="finite"):
            make_trainer(tmp_path).validate(module, datamodule=tiny_data(), verbose=False)


class TestCheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> str:
        trainer = make_trainer(tmp_path)
        trainer.fit(make_module(), datamodule=tiny_data())
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return str(tmp_path / "run.ckpt")

    def test_holds_no_base_weight(self, checkpoint: str) -> None:
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert state
        assert all(".lora_" in name or ".slot_encoder." in f".{name}" for name in state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"base_seed": 1}, "other base weights.*predictor.backbone.path"),
            ({"sampling": SamplingConfig(temperature=0.9, top_k=8, top_p=0.9)}, "predictor.sampling"),
            ({"objective": IndependentObjective()}, "predictor.objective"),
            ({"features": BinaryFeatures(4)}, "predictor.features"),
            ({"head": "linear"}, "predictor.head"),
            ({"student": FullCopyStudent()}, "predictor.student"),
            ({"lora": LoraSettings(rank=3)}, "predictor.lora"),
            ({"lora": LoraSettings(rank=2, target_modules=["q_proj"])}, "predictor.lora"),
        ],
        ids=["base", "sampling", "objective", "features", "head", "student", "rank", "target_modules"],
    )
    def test_that_does_not_fit_is_refused(
        self, tmp_path: Path, checkpoint: str, change: dict[str, Any], message: str
    ) -> None:
        module = make_module(**change)
        before = weights(module)
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, max_steps=4).fit(module, datamodule=tiny_data(), ckpt_path=checkpoint)
        assert all(torch.equal(value, before[name]) for name, value in module.predictor.state_dict().items())

    def test_of_another_kind_of_module_is_refused(self, tmp_path: Path, checkpoint: str) -> None:
        content = torch.load(checkpoint, weights_only=True)
        del content["predictor"]
        torch.save(content, checkpoint)
        with pytest.raises(ValueError, match="expected a checkpoint with a predictor.*ckpt_path"):
            make_trainer(tmp_path, max_steps=4).fit(make_module(), datamodule=tiny_data(), ckpt_path=checkpoint)
