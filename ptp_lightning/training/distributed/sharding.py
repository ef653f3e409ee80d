"""How a module in training is shared out among processes by FSDP2: its decoder layers one by one, all else together."""

from __future__ import annotations

from collections.abc import Iterable

from lightning import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from ptp_lightning.training.distributed.strategies import FullyShardedStrategy

STEPS = ("training_step", "validation_step", "test_step")


def shard(module: LightningModule, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a module, in `configure_model`. A second call changes nothing.

    A layer is gathered whenever it runs and let go again, adapters with the weights that they belong to. What is left
    (embeddings and output heads, which may be tied; norms; the slot encoder with its refiner) is gathered for a whole
    step: a step calls these parts in many ways and at many times, not by one `forward`.

    Args:
        module: in training.
        layers: decoder layers, each of which the step calls as a whole and whose output the loss depends on. Layers
            that only act through what they leave in a cache would be let go before their backward pass.
        mesh: the processes, in one dimension.

    Raises:
        ValueError: the strategy is Lightning's own for FSDP2.
    """
    if isinstance(module, FSDPModule):
        return
    if not isinstance(module.trainer.strategy, FullyShardedStrategy):
        raise ValueError(
            f"expected trainer.strategy ptp_lightning.training.FullyShardedStrategy, found "
            f"{type(module.trainer.strategy).__name__}, whose checkpoints other strategies cannot go on from: set it, "
            "or add --config configs/strategy/fsdp2.yaml"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for step in STEPS:
        register_fsdp_forward_method(module, step)
