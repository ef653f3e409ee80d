"""FSDP2 sharding of a training module: each decoder layer is one unit, all other parameters form another."""

from __future__ import annotations

from collections.abc import Iterable

from lightning import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from ptp_lightning.training.distributed.strategies import FullyShardedStrategy

STEPS = ("training_step", "validation_step", "test_step")


def shard(module: LightningModule, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a module, in `configure_model`. A second call has no effect.

    A layer is gathered, with its adapters, for each of its calls. The other parameters (embeddings and output heads,
    which may be tied; norms; the slot encoder with its correction) are gathered for a whole step, because a step uses
    them outside of any single `forward`.

    Args:
        module: the training module.
        layers: decoder layers that the step calls as modules and whose outputs the loss depends on. A layer that the
            loss depends on only through a cache would be resharded before its backward pass.
        mesh: the processes, in one dimension.

    Raises:
        ValueError: the strategy is Lightning's own for FSDP2.
    """
    if isinstance(module, FSDPModule):
        return
    if not isinstance(module.trainer.strategy, FullyShardedStrategy):
        raise ValueError(
            f"expected trainer.strategy ptp_lightning.training.FullyShardedStrategy, found "
            f"{type(module.trainer.strategy).__name__}, whose checkpoints other strategies cannot resume: set it, or "
            "add --config configs/strategy/fsdp2.yaml"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The rows of the draft head are copied from the sharded output head, and are read outside of any `forward`.
    draft_rows = {parameter for name, parameter in module.named_parameters() if ".draft_head." in name}
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=draft_rows)
    for step in STEPS:
        register_fsdp_forward_method(module, step)
