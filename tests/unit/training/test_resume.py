"""`fit` continued from last.ckpt is the uninterrupted run, bit for bit (CPU, float32)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.students import FullCopyStudent, SharedStudent
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.callbacks import ValidatedCheckpoint
from ptp_lightning.training.modules.autoregressive import AutoregressiveModule
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.modules.inverse_autoregressive import InverseAutoregressiveModule
from ptp_lightning.training.optimization import OptimizerSettings
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_data import tiny_data

MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


class PowerCutError(RuntimeError):
    pass


class Record(Callback):
    """Losses of every batch and results of every validation; may pull the plug at the start of a batch."""

    def __init__(self, cut_at_step: int | None = None) -> None:
        self.cut_at_step = cut_at_step
        self.losses: list[tuple[int, float]] = []
        self.validations: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.cut_at_step:
            raise PowerCutError

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append((trainer.global_step, float(outputs["loss"])))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning keeps tags of earlier validations; these are in every one.
        tags = ("val/correct_tokens", "val/accuracy/position_01", "val/perplexity/position_03", "val/bits_per_byte")
        self.validations.append({t: float(v) for t, v in trainer.callback_metrics.items() if t in tags})


def distillation(optimizer: OptimizerSettings) -> DistillationModule:
    config = PredictorConfig(
        BackboneSettings(from_config=MODEL),
        lora=LoraSettings(rank=2),
        sampling=SamplingConfig(temperature=0.8, top_k=8, top_p=0.9),
        window_length=4,
        correction=DecoderRefiner(num_layers=1),
    )
    return DistillationModule(config, optimizer=optimizer)


def full_copy(optimizer: OptimizerSettings) -> DistillationModule:
    config = PredictorConfig(
        BackboneSettings(from_config=MODEL),
        sampling=SamplingConfig(temperature=0.8, top_k=8, top_p=0.9),
        window_length=4,
        student=FullCopyStudent(),
    )
    return DistillationModule(config, optimizer=optimizer)


def teacher_free(optimizer: OptimizerSettings) -> InverseAutoregressiveModule:
    config = PredictorConfig(BackboneSettings(from_config=MODEL), window_length=4, student=SharedStudent())
    return InverseAutoregressiveModule(config, optimizer=optimizer)


def pretraining(optimizer: OptimizerSettings) -> AutoregressiveModule:
    return AutoregressiveModule(BackboneSettings(from_config=MODEL), optimizer)


def fit(
    make: Any,
    name: str,
    directory: Path,
    record: Record,
    checkpoint: Path | None = None,
    *,
    more_callbacks: Sequence[Callback] = (),
    save_on_exception: bool = False,
    saved_after: int = 3,
    logger: DummyLogger | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Six steps with a validation after every second batch, last.ckpt after some steps; gives the weights."""
    torch.manual_seed(0)
    module = make(OptimizerSettings(name, learning_rate=0.01, warmup_steps=2))  # pyright: ignore[reportArgumentType]
    torch.manual_seed(123 if checkpoint is None else 321)  # nothing may depend on torch's global generator
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=logger or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            record,
            *more_callbacks,
            ValidatedCheckpoint(
                directory,
                save_last=True,
                save_top_k=0,
                every_n_train_steps=saved_after,
                save_on_exception=save_on_exception,
            ),
        ],
        **options,
    )
    trainer.fit(module, datamodule=tiny_data(), ckpt_path=checkpoint)
    assert trainer.global_step == 6
    return {key: value.clone() for key, value in module.state_dict().items()}


@one_in(2, make=[distillation, full_copy, teacher_free, pretraining], optimizer=["adamw", "muon"], accumulate=[1, 2])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, make: Any, optimizer: str, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole, before, after = Record(), Record(cut_at_step=4), Record()

    expected = fit(make, optimizer, tmp_path / "whole", whole, **options)
    with pytest.raises(PowerCutError):
        fit(make, optimizer, tmp_path / "cut", before, **options)
    last = tmp_path / "cut" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    found = fit(make, optimizer, last.parent, after, checkpoint=last, **options)

    assert len(whole.losses) == 6 * accumulate and len({loss for _, loss in whole.losses}) == 6 * accumulate
    assert before.losses == whole.losses[: 4 * accumulate]
    assert after.losses == whole.losses[3 * accumulate :]
    assert len(whole.validations) == 3 * accumulate
    assert after.validations == whole.validations[-len(after.validations) :] and after.validations
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_holds_the_validation_of_its_step(tmp_path: Path, accumulate: int) -> None:
    """It does, and what goes on from it neither repeats that validation nor differs from the uninterrupted run."""
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "saved_after": 4}
    whole, before, after = Record(), Record(cut_at_step=4), Record()

    expected = fit(distillation, "adamw", tmp_path / "whole", whole, **options)
    with pytest.raises(PowerCutError):
        fit(distillation, "adamw", tmp_path / "cut", before, **options)
    last = tmp_path / "cut" / "last.ckpt"
    counts = torch.tensor(torch.load(last, weights_only=True)["predictor"]["prefix_counts"]).double()
    found = fit(distillation, "adamw", last.parent, after, checkpoint=last, **options)

    mean = float((counts * torch.arange(len(counts))).sum() / counts.sum())
    assert mean == pytest.approx(before.validations[-1]["val/correct_tokens"])
    assert len(before.validations) == 2 * accumulate and before.validations[-1] != before.validations[0]
    assert before.validations + after.validations == whole.validations
    assert before.losses + after.losses == whole.losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stop_before_the_next_validation_keeps_the_counts(tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        fit(distillation, "adamw", tmp_path / "cut", Record(cut_at_step=4), saved_after=4)
    last = tmp_path / "cut" / "last.ckpt"
    with pytest.raises(PowerCutError):
        fit(distillation, "adamw", tmp_path / "again", Record(cut_at_step=5), last, save_on_exception=True)
    before, after = (torch.load(file, weights_only=True) for file in (last, tmp_path / "again" / "last.ckpt"))
    assert after["global_step"] == 5
    assert after["predictor"]["prefix_counts"] == before["predictor"]["prefix_counts"]


def test_epochs_limited_by_the_trainer_resume_too(tmp_path: Path) -> None:
    """Three epochs of two batches: an epoch goes on in the stream where the last one stopped."""
    whole, limited, cut, resumed = Record(), Record(), Record(cut_at_step=5), Record()
    fit(distillation, "adamw", tmp_path / "whole", whole)
    expected = fit(distillation, "adamw", tmp_path / "limited", limited, limit_train_batches=2)
    with pytest.raises(PowerCutError):
        fit(distillation, "adamw", tmp_path / "cut", cut, limit_train_batches=2)
    last = tmp_path / "cut" / "last.ckpt"
    found = fit(distillation, "adamw", last.parent, resumed, last, limit_train_batches=2)
    assert len({loss for _, loss in limited.losses}) == 6
    assert limited.losses[:2] == whole.losses[:2]
    assert resumed.losses == limited.losses[3:]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class StopIn(Callback):
    """Raises in one hook, the first time after some batches of this run."""

    def __init__(self, hook: str, num_batches: int) -> None:
        self._num_batches = num_batches
        self._left = num_batches
        setattr(self, hook, self._stop)

    def on_train_batch_start(self, *_: Any) -> None:
        self._left -= 1

    def _stop(self, *_: Any) -> None:
        if self._left <= 0:
            raise PowerCutError


STOPS = [
    ("on_after_backward", 1),
    ("on_before_optimizer_step", 1),
    ("on_before_backward", 2),
    ("on_train_batch_end", 1),
    ("on_validation_start", 1),
    ("on_after_backward", 2),
    ("on_before_zero_grad", 1),
]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])  # 2: a stop inside a step, too
def test_a_chain_of_stops_in_the_middle_of_batches(tmp_path: Path, accumulate: int) -> None:
    """Each run resumes from the checkpoint that the exception of the last one left, and writes a periodic one too."""
    whole = Record()
    options = {"accumulate_grad_batches": accumulate}
    expected = fit(distillation, "muon", tmp_path / "whole", whole, **options)

    checkpoint, losses = None, {}
    for number, stop in enumerate([*STOPS, None]):
        record, folder = Record(), tmp_path / str(number)
        callbacks = [] if stop is None else [StopIn(*stop)]
        found = None
        try:
            found = fit(
                distillation,
                "muon",
                folder,
                record,
                checkpoint,
                more_callbacks=callbacks,
                save_on_exception=True,
                **options,
            )
        except PowerCutError:
            written = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
            checkpoint = written[-1] if written else checkpoint  # nothing is written before the first step
        losses |= dict(record.losses)
        if found is not None:
            break
    assert losses == dict(whole.losses)
    assert found is not None and all(torch.equal(found[name], expected[name]) for name in expected)


class Entries(DummyLogger):
    """Steps and values of what a training logs."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for tag, value in metrics.items():
            entries = self.values.setdefault(tag, {})
            assert step is not None and entries.get(step, value) == value, f"{tag} at step {step} differs"
            entries[step] = value


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_steps_of_a_chain_of_stops_are_those_of_the_uninterrupted_run(tmp_path: Path, accumulate: int) -> None:
    """Each run stops between two steps, as after a signal."""
    whole, chain = Entries(), Entries()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1, "save_on_exception": True}
    fit(distillation, "adamw", tmp_path / "whole", Record(), logger=whole, **options)

    checkpoint = None
    for step in (1, 2, 3, 5):
        folder = tmp_path / str(step)
        with pytest.raises(PowerCutError):
            fit(distillation, "adamw", folder, Record(cut_at_step=step), checkpoint, logger=chain, **options)
        checkpoint = max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    fit(distillation, "adamw", tmp_path / "end", Record(), checkpoint, logger=chain, **options)
    for tag in ("train/loss_nats", "val/correct_tokens"):
        assert chain.values[tag] == whole.values[tag] and len(whole.values[tag]) >= 3
    assert sorted(whole.values["train/loss_nats"]) == [0, 1, 2, 3, 4, 5]


def test_settings_of_the_optimizer_are_those_of_the_command(tmp_path: Path) -> None:
    """A checkpoint holds moments and the number of steps; rates, weight decay and schedule are configured anew."""
    torch.manual_seed(0)
    module = distillation(OptimizerSettings("muon", 0.01, 0.02, weight_decay=0.1, warmup_steps=0, decay_fraction=0))
    run_for(module, 3, tmp_path)
    settings = OptimizerSettings("muon", 0.001, 0.002, weight_decay=0.3, betas=(0.8, 0.9), warmup_steps=8)
    torch.manual_seed(0)
    resumed = distillation(settings)
    rates = Rates()
    run_for(resumed, 6, tmp_path / "resumed", rates, ckpt_path=tmp_path / "last.ckpt")
    scale = [(step + 1) / 8 for step in (3, 4, 5)]
    scale[2] *= 1 / 2  # the last two of six steps decay: max(int(6 * 0.4), 1) = 2, and the sixth is halfway
    assert rates.of_groups == [[pytest.approx(0.001 * s), pytest.approx(0.002 * s)] for s in scale]
    assert rates.others == [(0.3, None), (0.0, (0.8, 0.9))]


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run_for(distillation(OptimizerSettings("muon")), 1, tmp_path)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="expected a checkpoint of optimizer.name adamw, found one of muon: set"):
        run_for(distillation(OptimizerSettings("adamw")), 2, tmp_path, ckpt_path=tmp_path / "last.ckpt")


class Rates(Callback):
    """The settings of the optimiser's groups in each step."""

    def __init__(self) -> None:
        self.of_groups: list[list[float]] = []
        self.others: list[tuple[float, tuple[float, float] | None]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.of_groups.append([group["lr"] for group in optimizer.param_groups])
        self.others = [(group["weight_decay"], group.get("betas")) for group in optimizer.param_groups]


def run_for(
    module: LightningModule, steps: int, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)],
    )
    trainer.fit(module, datamodule=tiny_data(), ckpt_path=ckpt_path)
