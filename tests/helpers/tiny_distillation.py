"""Tiny distillation modules and trainers, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from ptp_lightning.losses import CrossEntropy, KullbackLeibler, Loss, PositionWeights, UniformWeights
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.slots.continuous_features import CosineFeatures
from ptp_lightning.models.slots.objectives import (
    CategoricalObjective,
    IndependentObjective,
    Objective,
    OneHotObjective,
    SequentialObjective,
)
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSource

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,  # far from uniform
}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}

PAIRS: list[tuple[Objective, Loss]] = [
    (OneHotObjective(), CrossEntropy()),
    (CategoricalObjective(), KullbackLeibler()),
    (IndependentObjective(), KullbackLeibler()),
    (SequentialObjective(), KullbackLeibler()),
]
by_objective = pytest.mark.parametrize(("objective", "loss"), PAIRS, ids=[pair[0].name for pair in PAIRS])


def make_module(
    backbone: dict[str, Any] = LLAMA,
    loss: Loss = KullbackLeibler(),  # noqa: B008  frozen
    source: WindowSource = TeacherWindows(),  # noqa: B008  frozen
    optimizer: str = "adamw",
    base_seed: int = 0,
    position_weights: PositionWeights = UniformWeights(),  # noqa: B008  frozen
    val_sampling: tuple[SamplingConfig, ...] = (),
    **predictor: Any,
) -> DistillationModule:
    """A module with the same weights on every call; `predictor` are further fields of `PredictorConfig`."""
    defaults = {
        "features": CosineFeatures(4),
        "lora": LoraSettings(rank=2),
        "sampling": SamplingConfig(temperature=0.8, top_k=8, top_p=0.9),
        "window_length": 4,
        "correction": DecoderRefiner(num_layers=1, intermediate_size=16),
    }
    torch.manual_seed(base_seed)
    return DistillationModule(
        PredictorConfig(backbone=BackboneSettings(from_config=backbone), **(defaults | predictor)),
        loss=loss,
        source=source,
        val_source=source,
        position_weights=position_weights,
        val_sampling=val_sampling,
        optimizer=OptimizerSettings(optimizer, learning_rate=0.01, warmup_steps=2),  # pyright: ignore[reportArgumentType]
    )


def make_trainer(directory: Path, **options: Any) -> Trainer:
    defaults = {"max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=directory, **(defaults | quiet | options))


def weights(module: DistillationModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.predictor.state_dict().items()}


def record_losses(module: DistillationModule) -> list[float]:
    """A list that `fit` fills with the loss of every batch."""
    losses: list[float] = []
    module.on_train_batch_end = lambda outputs, *_: losses.append(float(outputs["loss"]))
    return losses
