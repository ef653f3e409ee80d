"""Memory-efficient layers: norms and rotary attention with fewer intermediates, for the training of windows."""

from __future__ import annotations

from torch import nn

from ptp_lightning.models.layers.replacement import replace_modules
from ptp_lightning.models.layers.rms_norm import SUPPORTED_NORMS, MemoryEfficientRMSNorm
from ptp_lightning.models.layers.rotary_attention import SUPPORTED_ATTENTION, MemoryEfficientAttention


def use_memory_efficient_layers(model: nn.Module) -> None:
    """Replace the supported norms and attention layers of a model, in place; others stay as they are.

    Where nothing is trained, and under a compiler, the replacements compute what they replaced, bit for bit. In
    training, results differ by rounding.
    """
    replace_modules(model, SUPPORTED_NORMS, MemoryEfficientRMSNorm)
    replace_modules(model, SUPPORTED_ATTENTION, MemoryEfficientAttention)
