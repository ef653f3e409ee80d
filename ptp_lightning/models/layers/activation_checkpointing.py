"""Activation checkpointing of decoder layers that append to a KV cache and may carry gated adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptp_lightning.models.attention.caches import same_tensors
from ptp_lightning.models.lora.gate import Gate


def checkpoint_layers(layers: Iterable[nn.Module], gate: Gate) -> None:
    """Let layers drop their activations and recompute them in the backward pass; changed in place.

    The checkpointing of transformers works without a cache and in train mode only, so neither for slots after a context
    nor for a base model that stays in eval mode.

    Args:
        layers: decoder layers, called with a `Cache` or without. The recomputation gets the cache as it was, and leaves
            the caller's cache alone.
        gate: of their adapters; the recomputation sees it in the state of the first computation.
    """
    for layer in layers:
        # The object's forward, not its call: hooks, with which FSDP gathers the weights, must run once.
        cast(Any, layer).forward = partial(_run, layer.forward, gate)


def _run(forward: Callable[..., Any], gate: Gate, *args: Any, **kwargs: Any) -> Any:
    """Run a layer, and save what is needed to run it again if gradients are wanted."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    saved_args = [_snapshot(argument) for argument in args]
    saved_kwargs = {name: _snapshot(argument) for name, argument in kwargs.items()}
    is_first = True

    def compute() -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            return forward(*args, **kwargs)
        # Snapshots of the snapshots: the backward pass may run several times.
        return forward(*map(_snapshot, saved_args), **{name: _snapshot(value) for name, value in saved_kwargs.items()})

    return checkpoint(compute, use_reentrant=False, context_fn=gate.checkpoint_contexts)


def _snapshot(argument: Any) -> Any:
    """A cache that keeps its present length, with the same tensors; anything else as it is."""
    from transformers import Cache

    return same_tensors(argument) if isinstance(argument, Cache) else argument
