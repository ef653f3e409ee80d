"""Optimisers and learning-rate schedules of all training modules."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

# Parts of names of embeddings (of tokens, positions and auxiliaries), which get neither Muon nor weight decay. Renaming
# a module in or out of this list changes how it is trained.
EMBEDDING_NAMES = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimiser and schedule.

    Args:
        name: `adamw`, or `muon`: orthogonalised updates for weight matrices and AdamW for all else.
        learning_rate: peak value, after warm-up. Muon's updates are scaled to the size of AdamW's.
        adamw_learning_rate: peak value for the parameters that Muon leaves to AdamW; by default `learning_rate`.
        weight_decay: decoupled; on weight matrices, not on embeddings.
        betas: of AdamW.
        warmup_steps: length of the linear warm-up from 0.
        decay_fraction: fraction of all steps, at the end, over which the rate decays linearly to 0.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    adamw_learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 50
    decay_fraction: float = 0.4

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a finite optimizer.learning_rate > 0, found {self.learning_rate}")
        if self.adamw_learning_rate is not None:
            if self.name != "muon":
                raise ValueError(
                    "expected optimizer.adamw_learning_rate with optimizer.name: muon only, found "
                    f"{self.adamw_learning_rate} with {self.name}"
                )
            if not 0 < self.adamw_learning_rate < math.inf:
                raise ValueError(
                    f"expected a finite optimizer.adamw_learning_rate > 0, found {self.adamw_learning_rate}"
                )
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"expected optimizer.decay_fraction between 0 and 1, found {self.decay_fraction}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected optimizer.betas from 0 to below 1, found {list(self.betas)}")
        for name in ("weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected optimizer.{name} >= 0, found {getattr(self, name)}")


class JointOptimizer(torch.optim.Optimizer):
    """Several optimisers over disjoint parameters, as a single optimiser for Lightning and schedulers."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Let `param_groups` hold the members' own dictionaries, so that a scheduler changes the members."""
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


class StepSchedule(LambdaLR):
    """A schedule that a checkpoint resumes at a step, with the peak rates and the shape that are configured now.

    A `LambdaLR` would restore the peak rates, and the optimiser the rate, of the earlier run.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> def halved(rate):
    ...     return StepSchedule(torch.optim.SGD([weight], lr=rate), lambda step: 0.5)
    >>> resumed = halved(rate=8.0)
    >>> resumed.load_state_dict(halved(rate=2.0).state_dict())
    >>> resumed.optimizer.param_groups[0]["lr"]
    4.0
    """

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after as many steps; other entries, as Lightning stored them for `LambdaLR`, are not used."""
        self.resume_at(state_dict["last_epoch"])

    def resume_at(self, step: int) -> None:
        """Set the rates of a step."""
        self.last_epoch = step
        self._last_lr = [rate * scale(step) for rate, scale in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def configure(
    settings: OptimizerSettings, named_parameters: Iterable[tuple[str, nn.Parameter]], total_steps: float
) -> OptimizerLRScheduler:
    """Optimiser and per-step schedule (warm-up, constant, linear decay) in Lightning's format.

    A resumed run takes the state of the optimiser (its moments) and the number of steps from the checkpoint, and all
    settings, learning rates among them, from its own configuration.

    Args:
        settings: optimiser and schedule.
        named_parameters: those that require a gradient are trained.
        total_steps: length of the schedule, the trainer's `estimated_stepping_batches`.

    Raises:
        ValueError: the number of steps is unknown, or Muon cannot update a shard.
    """
    if not 0 < total_steps < math.inf:  # Lightning gives -1 or inf for an endless stream without a limit
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
                    others, lr=settings.adamw_learning_rate or rate, betas=settings.betas, weight_decay=0.0
                ),
            ]
        )
    else:
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=settings.betas)

    decay_steps = total_steps - decay_start(settings, total_steps)

    def scale(step: int) -> float:
        """The learning rate at a step, as a fraction of the peak."""
        warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        decay = min(1.0, max(total_steps - step, 0) / decay_steps)
        return warmup * decay

    schedule = StepSchedule(optimizer, scale)
    for member in optimizer.optimizers if isinstance(optimizer, JointOptimizer) else [optimizer]:
        _keep_settings(member)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decay_start(settings: OptimizerSettings, total_steps: float) -> float:
    """The step at which the rate begins to decay; the rates before it are those of every longer training.

    >>> decay_start(OptimizerSettings(decay_fraction=0.4), total_steps=200)
    120
    """
    return total_steps - max(int(total_steps * settings.decay_fraction), 1)


def _keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser that loads a state take no settings from it."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    def restore(loaded: torch.optim.Optimizer) -> None:
        for group, configured in zip(loaded.param_groups, settings, strict=True):
            group.update(configured)

    optimizer.register_load_state_dict_post_hook(restore)


def require_same_optimizer(settings: OptimizerSettings, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another optimiser, whose state has other entries.

    Raises:
        ValueError: names the key.
    """
    for state in checkpoint.get("optimizer_states", []):
        found = "muon" if "optimizers" in state else "adamw"
        if found != settings.name:
            raise ValueError(
                f"expected a checkpoint of optimizer.name {settings.name}, found one of {found}: set optimizer.name to "
                f"{found}, or start anew without ckpt_path"
            )


def _require_rows_for_all(trainable: Mapping[str, nn.Parameter], matrices: set[int]) -> None:
    """Refuse matrices with fewer rows than processes: torch cannot orthogonalise a sharded matrix with empty shards."""
    for name, parameter in trainable.items():
        if id(parameter) not in matrices or not isinstance(parameter, DTensor):
            continue
        processes, rows = parameter.device_mesh.size(), parameter.shape[0]
        if rows < processes:
            raise ValueError(
                f"expected matrices of at least {processes} rows, one for each process of trainer.strategy, with "
                f"optimizer.name muon, found {rows} in {name}: set optimizer.name to adamw, "
                "trainer.strategy to ddp, or raise predictor.lora.rank"
            )
