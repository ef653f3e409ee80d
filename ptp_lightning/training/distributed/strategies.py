"""FullyShardedStrategy: FSDP2 over all processes, with checkpoints that any number of processes can resume."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ptp_lightning.training.optimization import JointOptimizer


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards weights, gradients and optimiser states over all processes (see `sharding`).

    Lightning's own strategy gathers every weight for a checkpoint, including frozen ones, and renumbers the optimiser's
    states. This one writes the same file as a single process, tensor by tensor on rank zero's CPU, so that a run can be
    resumed with another strategy and another number of processes.

    Args:
        process_group_backend: by default nccl on GPUs and gloo on CPUs.
        timeout: of collective operations; by default torch's.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Make one shard per process; Lightning's default is one per node.

        Raises:
            ValueError: the number of processes differs from `trainer.devices` times `trainer.num_nodes`.
        """
        assert self.cluster_environment is not None
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: states are restored by `load_optimizer_state_dict`, as in other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The sharded state; `save_checkpoint` gathers it, after the module has removed frozen weights."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The sharded state, see `lightning_module_state_dict`."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Gather all shards and write one file; a collective operation."""
        super().save_checkpoint(apply_to_collection(checkpoint, DTensor, self._gathered), filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The full tensors of the file."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's shards of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _sharded_like(own.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shards of the optimisers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_sharded_state(optimizer, state))

    def _gathered(self, value: DTensor) -> Tensor | None:
        """The full tensor on rank zero, None on other ranks."""
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None


def _sharded_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's `state_dict` of full tensors; those of a parameter's shape are sharded like the parameter."""
    if isinstance(optimizer, JointOptimizer):
        members = zip(optimizer.optimizers, state["optimizers"], strict=True)
        return state | {"optimizers": [_sharded_state(*member) for member in members]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return state | {
        "state": {
            number: {name: _sharded_like(parameters[number], value) for name, value in entries.items()}
            for number, entries in state["state"].items()
        }
    }


def _sharded_like(own: Tensor | None, value: Any) -> Any:
    """This process's shard of a full tensor if `own` is sharded; else the value itself."""
    if not (isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape):
        return value
    whole = value.to(own.device)
    # Every process has read the file, so no communication is needed.
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
