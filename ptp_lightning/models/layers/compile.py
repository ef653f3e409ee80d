"""Decoder layers compiled by torch for training: fewer kernels, and fewer of them that wait for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Let layers run compiled where gradients are wanted; changed in place.

    What reads without gradients, contexts and decoders, runs as before, bit for bit the base model. Attention is left
    out, so that nothing compiled depends on the number of a layer: all layers of one kind share what is compiled, once
    for each shape. Where layers are checkpointed too, compile them first.

    Args:
        layers: decoder layers.
        backend: of `torch.compile`.
    """
    for layer in layers:
        # Of this object alone, so that a module's hooks, with which FSDP gathers its weights, stay outside.
        compiled = torch.compile(layer.forward, backend=backend, dynamic=False)
        cast(Any, layer).forward = partial(_run, compiled, layer.forward)


def _run(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
