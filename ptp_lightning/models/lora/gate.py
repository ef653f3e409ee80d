"""The gate: at which token positions of a call the adapters of a model act."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class GateState(NamedTuple):
    """Positions at which an open gate lets the adapter act: all of them if both fields are None.

    Attributes:
        mask: bool [B, T], True where the adapter acts.
        suffix: number of last positions of every row on which it acts.
    """

    mask: Tensor | None
    suffix: int | None

    @property
    def is_everywhere(self) -> bool:
        """Whether the adapter acts at all positions."""
        return self.mask is None and self.suffix is None


class Gate:
    """The switch shared by all gated layers of a model; closed unless a `with` block opens it.

    While it is closed no LoRA arithmetic runs and the adapter's parameters take no part in the graph. To keep them in
    it without any effect (DDP wants a gradient for every parameter on every rank) open it with `suffix=0`.

    Activation checkpointing runs the forward pass again during backward, when the `with` block may have ended. Pass
    `checkpoint_contexts`, so that the recomputation sees the gate as it was:

        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": gate.checkpoint_contexts})

    Without it, keep the block open until backward is done: under another gate torch's non-reentrant checkpoint raises
    `CheckpointError`, but the reentrant one silently returns wrong gradients.

    Attributes:
        state: positions at which the adapter acts, None while the gate is closed; set by the context managers only.

    >>> gate = Gate()
    >>> with gate.open(suffix=2):
    ...     print(gate.state)
    GateState(mask=None, suffix=2)
    >>> gate.state is None
    True
    """

    def __init__(self) -> None:
        self.state: GateState | None = None

    @contextmanager
    def open(self, mask: Tensor | None = None, *, suffix: int | None = None) -> Iterator[None]:
        """Let the adapter act inside the block: everywhere, where a mask is true, or on each row's last positions.

        Args:
            mask: bool [B, T], True where the adapter acts.
            suffix: Number of last positions on which it acts; like the equivalent mask, but the low-rank term is
                computed on these positions only. 0 changes nothing and gives zero gradients.

        Raises:
            ValueError: Both are given, or either is malformed. Layers raise it for inputs that the state does not fit.
        """
        if mask is not None and suffix is not None:
            raise ValueError("expected a gate mask or a gate suffix, found both")
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2):
            raise ValueError(f"the gate mask must be bool [B, T], found {mask.dtype} {list(mask.shape)}")
        if suffix is not None and suffix < 0:
            raise ValueError(f"the gate suffix must be at least 0 positions, found {suffix}")
        with _StateContext(self, GateState(mask, suffix)):
            yield

    def closed(self) -> AbstractContextManager[None]:
        """Keep the adapter inactive inside the block, also within an outer `open` (for a teacher call)."""
        return _StateContext(self, None)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of `torch.utils.checkpoint`: recomputes a layer with the gate of its first computation."""
        return nullcontext(), _StateContext(self, self.state)


class _StateContext(AbstractContextManager[None]):
    """Holds a gate in one state; a class because checkpoints enter theirs again on every further backward."""

    def __init__(self, gate: Gate, state: GateState | None) -> None:
        self._gate = gate
        self._state = state

    def __enter__(self) -> None:
        self._previous = self._gate.state
        self._gate.state = self._state

    def __exit__(self, *exception: object) -> None:
        self._gate.state = self._previous
