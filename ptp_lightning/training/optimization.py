"""Optimisers and learning-rate schedules, chosen by settings and the same for every module."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.tensor import DTensor

# Embedding tables are looked up, not multiplied by: neither orthogonalised updates nor decay make sense for them.
EMBEDDING_NAMES = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimiser and schedule.

    Args:
        name: `adamw`, or `muon`: orthogonalised updates for weight matrices and AdamW for all else.
        learning_rate: the highest, after warm-up. Muon's updates have the size of AdamW's, so one number may serve.
        other_learning_rate: the highest of what Muon leaves to AdamW; by default `learning_rate`.
        weight_decay: decoupled, on matrices only (embeddings are none).
        betas: AdamW's.
        warmup_steps: linear rise from 0.
        decay_fraction: share of all steps over which the rate falls linearly to 0 at the end.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    other_learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 50
    decay_fraction: float = 0.4

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if self.learning_rate <= 0:
            raise ValueError(f"expected optimizer.learning_rate > 0, found {self.learning_rate}")
        if self.other_learning_rate is not None:
            if self.name != "muon":
                raise ValueError(
                    "expected optimizer.other_learning_rate with optimizer.name: muon only, found "
                    f"{self.other_learning_rate} with {self.name}"
                )
            if self.other_learning_rate <= 0:
                raise ValueError(f"expected optimizer.other_learning_rate > 0, found {self.other_learning_rate}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"expected optimizer.decay_fraction between 0 and 1, found {self.decay_fraction}")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected optimizer.{name} >= 0, found {getattr(self, name)}")


class JointOptimizer(torch.optim.Optimizer):
    """Several optimisers over disjoint parameters that Lightning and schedulers see as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Make `param_groups` the members' own dictionaries, so that a scheduler's changes reach them."""
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; the closure runs once, before all of them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The members' states."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the members."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()


def configure(
    settings: OptimizerSettings, named_parameters: Iterable[tuple[str, nn.Parameter]], total_steps: float
) -> OptimizerLRScheduler:
    """Optimiser and per-step schedule (warm-up, constant, linear decay) in Lightning's format.

    Args:
        settings: which.
        named_parameters: those that require a gradient are trained.
        total_steps: length of the schedule, the trainer's `estimated_stepping_batches`.

    Raises:
        ValueError: the number of steps is not known, so the schedule has no end; or Muon cannot update a shard.
    """
    if not 0 < total_steps < math.inf:  # Lightning says -1 or inf for an endless stream without a limit
        raise ValueError(f"expected a limited number of steps, found {total_steps}: set trainer.max_steps")
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [
        parameter
        for name, parameter in trainable
        if parameter.ndim == 2 and not any(part in name for part in EMBEDDING_NAMES)
    ]
    chosen = set(map(id, matrices))
    others = [parameter for _, parameter in trainable if id(parameter) not in chosen]
    rate = settings.learning_rate
    if settings.name == "muon":
        _require_rows_for_all(dict(trainable), chosen)
        optimizer: torch.optim.Optimizer = JointOptimizer(
            [
                torch.optim.Muon(matrices, lr=rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(
                    others, lr=settings.other_learning_rate or rate, betas=settings.betas, weight_decay=0.0
                ),
            ]
        )
    else:
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=settings.betas)

    decay_steps = max(int(total_steps * settings.decay_fraction), 1)

    def scale(step: int) -> float:
        """Share of the highest rate at a step."""
        warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        decay = min(1.0, max(total_steps - step, 0) / decay_steps)
        return warmup * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _require_rows_for_all(trainable: Mapping[str, nn.Parameter], matrices: set[int]) -> None:
    """Muon's update of a sharded matrix is that of the whole one, but torch fails where processes have no row of it."""
    for name, parameter in trainable.items():
        if id(parameter) not in matrices or not isinstance(parameter, DTensor):
            continue
        processes, rows = parameter.device_mesh.size(), parameter.shape[0]
        if rows < processes:
            raise ValueError(
                f"expected matrices of at least {processes} rows, one for each process that trainer.strategy shards "
                f"them out to, beside optimizer.name muon, found {rows} in {name}: set optimizer.name to adamw, "
                "trainer.strategy to ddp, or raise predictor.lora.rank"
            )
