"""The attention function of a model, and how its decoder layers are run.

transformers passes keyword arguments of a model on to its attention function. `attend_to_windows` is registered there
under a name. A call that reads windows gives it `window_keys`; any other call gets transformers' own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ptp_lightning.models.attention.eager_attention import needs_eager_attention, register_eager_attention
from ptp_lightning.models.attention.interface import WindowKeys
from ptp_lightning.models.attention.sliding_window import layer_masks

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

ATTENTION_NAME = "sdpa_and_windows"


def use_window_attention(model: PreTrainedModel) -> bool:
    """Replace the attention function of a model by `attend_to_windows`, or by `attend_eagerly` if it has no SDPA.

    Calls without `window_keys` compute what they did before, bit for bit.

    Returns:
        Whether the model allows it: whether it passes keyword arguments on to its attention function.
    """
    if not model._supports_attention_backend:
        return False
    model.set_attn_implementation(register_eager_attention() if needs_eager_attention(model) else register_attention())
    return True


def register_attention() -> str:
    """Make `attend_to_windows` known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, attend_to_windows)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME


@torch.compiler.disable  # keys are found by the layer's index, which compiled layers must not depend on
def attend_to_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    window_keys: WindowKeys | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: `[B, heads, T, head size]` to `[B, T, heads, head size]`.

    Args:
        module: the attention module of a layer.
        query: of the T positions of the call.
        key: likewise.
        value: likewise.
        attention_mask: `[B, 1, T, P + T]`; not read with `window_keys`.
        window_keys: of a call that reads windows.
        **kwargs: further arguments of transformers.

    Raises:
        ValueError: the model caps its scores or has attention sinks, which the back-ends do not support.
    """
    if window_keys is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return attended, None
    if refused := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(
            f"expected plain softmax attention, found {type(module).__name__} with {refused[0]}, which is not "
            "supported: set predictor.backbone.path to another model"
        )
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return window_keys.attend(cast(int, module.layer_idx), query, key, value, scale), None


def run_stack(
    model: PreTrainedModel,
    embeddings: Tensor,
    position_ids: Tensor,
    mask: Tensor | None,
    cache: Cache | None,
    window_keys: WindowKeys | None = None,
    first_layer: int = 0,
) -> Tensor:
    """Run the stack of a causal LM in its dtype, from one of its layers on; arguments and result as in `RunLayers`."""
    decoder = getattr(model, model.base_model_prefix)
    windows = {}
    masks = None if mask is None else layer_masks(decoder.config, mask)
    if masks is None:
        assert window_keys is not None, "without a mask, window_keys say what is visible"
        # transformers makes no mask of its own where it gets one of four dimensions; nobody reads this one.
        masks = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)
        windows["window_keys"] = window_keys
    with nullcontext() if first_layer == 0 else _last_layers(decoder, first_layer):
        return decoder(
            inputs_embeds=embeddings.to(model.dtype),
            position_ids=position_ids,
            attention_mask=masks,
            cache=cache,
            use_cache=cache is not None,
            **windows,
        ).last_hidden_state


@contextmanager
def _last_layers(decoder: nn.Module, first: int) -> Iterator[None]:
    """Without the layers before `first`, inside the block; the others keep their indices in caches."""
    layers = cast(nn.ModuleList, decoder.layers)
    decoder.layers = layers[first:]
    try:
        yield
    finally:
        decoder.layers = layers


@contextmanager
def layer_input(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """Collects what one layer reads in the calls inside the block, each `[B, T, H]`.

    Args:
        model: a causal LM, see `first_slot_layer`.
        layer: index of the layer.
    """
    found: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    layers = cast(nn.ModuleList, getattr(model, model.base_model_prefix).layers)
    handle = layers[layer].register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
