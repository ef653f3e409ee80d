"""Activation checkpointing of decoder layers that append to a cache of keys and values, and that may be gated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptp_lightning.models.attention.caches import same_tensors
from ptp_lightning.models.lora.gate import Gate

if TYPE_CHECKING:
    pass


def checkpoint_layers(layers: Iterable[nn.Module], gate: Gate) -> None:
    """Let layers forget what they computed and compute it again in the backward pass; changed in place.

    That of transformers does without a cache and only in train mode, so neither for slots behind a context nor for a
    base model that stays in eval mode.

    Args:
        layers: decoder layers that are called with a `Cache` or without; it is as after the first computation when they
            have computed again.
        gate: of their adapters, which stays as it was for the layer.
    """
    for layer in layers:
        # Of this object alone, so that a module's hooks, with which FSDP gathers its weights, run once.
        cast(Any, layer).forward = partial(_run, layer.forward, gate)


def _run(forward: Callable[..., Any], gate: Gate, *args: Any, **kwargs: Any) -> Any:
    """Run a layer, or take note of how to run it again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    before = [_as_it_stands(argument) for argument in args]
    named_before = {name: _as_it_stands(argument) for name, argument in kwargs.items()}
    is_first = True

    def compute() -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            return forward(*args, **kwargs)
        # Copies once more: the backward pass may be run several times.
        named = {name: _as_it_stands(argument) for name, argument in named_before.items()}
        return forward(*map(_as_it_stands, before), **named)

    return checkpoint(compute, use_reentrant=False, context_fn=gate.checkpoint_contexts)


def _as_it_stands(argument: Any) -> Any:
    """Of a cache, what goes its own way when that one goes on; anything else as it is."""
    from transformers import Cache

    return same_tensors(argument) if isinstance(argument, Cache) else argument
