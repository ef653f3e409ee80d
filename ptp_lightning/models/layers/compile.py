"""Decoder layers compiled by torch for training: fewer kernels, and fewer of them wait for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Let layers run compiled where gradients are wanted; changed in place.

    Without gradients (contexts, decoding) they run as before, bit for bit the base model. Attention is not compiled, so
    that no compiled code depends on a layer's index: all layers of one kind share it, once for each shape. Compile
    layers before `checkpoint_layers`.

    Args:
        layers: decoder layers.
        backend: of `torch.compile`.
    """
    for layer in layers:
        # The object's forward, not its call: hooks, with which FSDP gathers the weights, are not compiled.
        compiled = torch.compile(layer.forward, backend=backend, dynamic=False)
        cast(Any, layer).forward = partial(_run, compiled, layer.forward)


def _run(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
