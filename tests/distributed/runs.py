"""Trainings of all kinds that two processes go through together, to be compared with one process.

Rank zero writes FOLDER/NAME.json. A NAME is `STRATEGY-RUN`, or `STRATEGY-RUN-resumed` to go on from the middle of what
one process did. tests/distributed/test_launchers.py starts processes as users do.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from ptp_lightning.models import (
    BackboneSettings,
    CosineFeatures,
    DecoderRefiner,
    FullCopyStudent,
    LoraSettings,
    MarkovHead,
    PredictorConfig,
    SharedStudent,
)
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training import (
    AutoregressiveModule,
    DatasetWindows,
    DistillationModule,
    FullyShardedStrategy,
    InverseAutoregressiveModule,
    OptimizerSettings,
)
from tests.distributed.shared_rows import Centres, SharedRows
from tests.helpers.forked_process import ForkedProcess
from tests.helpers.tiny_distillation import GPT2, LLAMA

STEPS, HALF = 20, 10
TIED = LLAMA | {"tie_word_embeddings": True}
CHECKPOINTED = {"activation_checkpointing": True}
STRATEGIES: dict[str, type[Strategy]] = {"ddp": DDPStrategy, "fsdp2": FullyShardedStrategy}


class Run(NamedTuple):
    """What is trained, and how; `module` and `trainer` are further arguments."""

    kind: str = "adapter"
    backbone: dict[str, Any] = LLAMA
    optimizer: str = "adamw"
    dtype: str = "float32"
    rank: int = 2
    module: Mapping[str, Any] = MappingProxyType({})
    trainer: Mapping[str, Any] = MappingProxyType({})


RUNS: dict[str, Run] = {
    "adapter": Run(),
    "adapter_tied": Run(backbone=GPT2),
    "copy": Run("copy", TIED),
    "heads": Run("heads"),
    "heads_tied": Run("heads", TIED),
    "shared": Run("shared", TIED),
    "autoregressive": Run("autoregressive", TIED),
    "muon": Run(optimizer="muon"),
    "muon_rank_1": Run(optimizer="muon", rank=1),
    "clipped": Run(trainer={"gradient_clip_val": 0.05}),
    "accumulated": Run(trainer={"accumulate_grad_batches": 2, "max_steps": HALF}),
    "checkpointed": Run(module=CHECKPOINTED),
    "checkpointed_copy": Run("copy", TIED, module=CHECKPOINTED),
    "checkpointed_shared": Run("shared", TIED, module=CHECKPOINTED),
    "checkpointed_autoregressive": Run("autoregressive", TIED, module=CHECKPOINTED),
    "bf16_base": Run(dtype="bfloat16"),
    "bf16_mixed": Run(trainer={"precision": "bf16-mixed"}),
    "bf16_true": Run(trainer={"precision": "bf16-true"}, dtype="bfloat16"),
}


def make_module(run: Run, folder: Path) -> LightningModule:
    """The same weights on every call; what it writes besides checkpoints goes to `folder`."""
    torch.manual_seed(0)
    backbone = BackboneSettings(from_config=run.backbone, dtype=run.dtype)  # pyright: ignore[reportArgumentType]
    optimizer = OptimizerSettings(run.optimizer, learning_rate=0.003, warmup_steps=2)  # pyright: ignore[reportArgumentType]
    if run.kind == "autoregressive":
        output = str(folder / "model")
        return AutoregressiveModule(backbone, optimizer, output, output_dtype="float32", **run.module)
    config = PredictorConfig(backbone, features=CosineFeatures(4), window_length=4)
    if run.kind == "shared":
        config = replace(config, student=SharedStudent())
        module = InverseAutoregressiveModule(config, strategy=Centres(), optimizer=optimizer, **run.module)
        return module.double()  # auxiliaries that a network infers itself amplify rounding
    config = replace(config, sampling=SamplingConfig(temperature=0.8), lora=LoraSettings(run.rank))
    if run.kind == "copy":
        config = replace(config, student=FullCopyStudent())
    elif run.kind == "heads":
        config = replace(config, correction=MarkovHead(rank=4), draft_vocabulary=10)
    elif run.backbone["model_type"] == "llama":
        config = replace(config, correction=DecoderRefiner(num_layers=1, intermediate_size=16))
    source = DatasetWindows(Centres())
    return DistillationModule(config, source=source, val_source=source, optimizer=optimizer, **run.module)


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        losses: of every batch, over all ranks.
        share: the part of all weights that a process held in the end.
        validated: what a fresh module says of the validation rows with the last checkpoint.
    """

    losses: list[float]
    share: float
    validated: dict[str, float]


def train(
    run: Run, folder: Path, strategy: type[Strategy] | None = None, devices: int = 1, resume: Path | None = None
) -> Outcome:
    """Leaves checkpoints of the middle and of the end in `folder`."""
    module = make_module(run, folder)
    losses: list[float] = []

    def note(outputs: Any, batch: Any, batch_idx: int) -> None:
        losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().double(), reduce_op="mean")))
        if trainer.global_step == HALF and resume is None:
            trainer.save_checkpoint(folder / "half.ckpt")

    def make_trainer() -> Trainer:
        defaults: dict[str, Any] = {"max_steps": STEPS, "num_sanity_val_steps": 0, "val_check_interval": STEPS}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return Trainer(
            accelerator="cpu",
            strategy="auto" if strategy is None else strategy(),
            devices=devices,
            default_root_dir=folder,
            logger=False,
            **(defaults | quiet | dict(run.trainer)),
        )

    module.on_train_batch_end = note
    trainer = make_trainer()
    trainer.fit(module, datamodule=SharedRows(), ckpt_path=resume)
    trainer.save_checkpoint(folder / "end.ckpt")
    parameters = list(module.parameters())
    held = sum(getattr(parameter, "to_local", lambda own=parameter: own)().numel() for parameter in parameters)
    options: dict[str, Any] = {"datamodule": SharedRows(), "ckpt_path": folder / "end.ckpt", "verbose": False}
    (validated,) = make_trainer().validate(make_module(run, folder), **options)
    return Outcome(losses, held / sum(parameter.numel() for parameter in parameters), dict(validated))


def together(folder: Path, *names: str, seconds: float = 280) -> None:
    """Two processes go through runs, one after the other."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    deadline = time.monotonic() + seconds
    ranks = [ForkedProcess(run_rank, rank, port, folder, names, folder=folder) for rank in range(2)]
    try:
        while not all(rank.poll() == 0 for rank in ranks) and not any(rank.returncode for rank in ranks):
            assert time.monotonic() < deadline, f"not done in {seconds} s"
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()  # it would wait for the other one
    failed = [rank for rank in ranks if rank.returncode != 0]
    assert not failed, failed[0].communicate()[1][-5000:]


def outcome(folder: Path, name: str) -> Outcome:
    return Outcome(**json.loads((folder / f"{name}.json").read_text()))


def run_rank(rank: int, port: int, folder: Path, names: Sequence[str]) -> None:
    """The program of a process."""
    place = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    for name in names:
        strategy, run, *resumed = name.split("-")
        resume = folder / run / "half.ckpt" if resumed else None
        result = train(RUNS[run], folder / name, STRATEGIES[strategy], devices=2, resume=resume)
        if torch.distributed.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(result._asdict()))
    torch.distributed.barrier()  # gloo may abort a process whose peer has left
    torch.distributed.destroy_process_group()
