"""What windows attend to in each layer, and the attention function through which a transformers model asks for it.

Keyword arguments of a model reach its attention function. `attend_windows` is registered under a name, finds
`window_keys` among them where a call reads windows, and is transformers' own attention where not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ptp_lightning.models.attention.blocks import block_attention
from ptp_lightning.models.attention.flex import FlexWindows, is_supported
from ptp_lightning.models.attention.visible_keys import VisibleKeys

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer

NAME = "sdpa_and_windows"


def attend_by_windows(model: PreTrainedModel) -> bool:
    """Let a model attend through `attend_windows`.

    Returns:
        Whether it can: whether it hands keyword arguments on to its attention.
    """
    if not model._supports_attention_backend:
        return False
    register()
    model.set_attn_implementation(NAME)
    return True


def register() -> str:
    """Make `attend_windows` known to transformers, and return the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend_windows)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


class WindowKeys:
    """Keys and values for a call that reads J places of each of N windows.

    Args:
        context: holds those of the context.
        keeps: whether those of a call stay for the next one.

    Attributes:
        flexes: whether FlexAttention is used where it is_supported; false to compare.
    """

    flexes = True

    def __init__(self, context: Cache | None, keeps: bool) -> None:
        self._context = context
        self._keeps = keeps
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._visible: VisibleKeys | None = None
        self._flex: FlexWindows | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sees_context: Tensor, scale: float
    ) -> Tensor:
        """Attention of a layer.

        Args:
            layer: its index.
            query: `[B, heads, N * J, D]`.
            key: `[B, key-value heads, N * J, D]`, of the places that are read.
            value: `[B, key-value heads, N * J, E]`.
            sees_context: `[B, N, S]` bool.
            scale: of the scores.

        Returns:
            `[B, N * J, heads, E]`.
        """
        assert self._context is not None
        context = cast("DynamicLayer", self._context.layers[layer])
        assert context.keys is not None and context.values is not None, "the context has been read"
        if not self._keeps and self.flexes and is_supported(query):
            if self._flex is None:
                self._flex = FlexWindows(sees_context, key.shape[2] // sees_context.shape[1])
            return self._flex.attend(query, (context.keys, context.values), (key, value), scale)
        return self._by_blocks(layer, query, key, value, (context.keys, context.values), sees_context, scale)

    def _by_blocks(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: tuple[Tensor, Tensor],
        sees_context: Tensor,
        scale: float,
    ) -> Tensor:
        num_windows = sees_context.shape[1]
        own = key.unflatten(2, (num_windows, -1)), value.unflatten(2, (num_windows, -1))
        if layer in self._kept:
            keys, values = self._kept[layer]
            own = torch.cat([keys, own[0]], dim=3), torch.cat([values, own[1]], dim=3)
        if self._keeps:
            self._kept[layer] = own
        num_rows, num_heads, _, size = query.shape
        shared = num_heads // key.shape[1]  # query heads of a key-value head
        # [B, key-value heads, N, shared heads * J, D]
        blocks = query.view(num_rows, -1, shared, num_windows, query.shape[2] // num_windows, size).transpose(2, 3)
        places = blocks.shape[4]
        attended = block_attention(
            blocks.flatten(3, 4),
            context,
            own,
            self._visible_keys(sees_context, shared, places, own[0].shape[3]),
            scale,
        )
        attended = attended.unflatten(3, (shared, places))  # [B, key-value heads, N, shared, J, E]
        return attended.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)

    def _visible_keys(self, sees_context: Tensor, shared: int, places: int, num_own: int) -> VisibleKeys:
        """Of the newest J of K places of a window, each sees those up to itself."""
        shape = shared * places, num_own
        if self._visible is None or self._visible.own.shape != shape:  # the same in all layers
            own = torch.ones(places, num_own, dtype=torch.bool, device=sees_context.device).tril(num_own - places)
            self._visible = VisibleKeys(sees_context, own.repeat(shared, 1))
        return self._visible


class JointKeys(WindowKeys):
    """Keys and values for a call that reads the context as well: its S tokens first, then J places of each window.

    Args:
        context_mask: `[B, 1, S, S]` bool.
    """

    def __init__(self, context_mask: Tensor) -> None:
        super().__init__(context=None, keeps=False)
        self._mask = context_mask

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sees_context: Tensor, scale: float
    ) -> Tensor:
        """As `WindowKeys.attend`, for S + N * J places."""
        size = sees_context.shape[2]
        (q, k, v), (queries, keys, values) = zip(
            *(tensor.split([size, tensor.shape[2] - size], dim=2) for tensor in (query, key, value)), strict=True
        )
        places = self._by_blocks(layer, queries, keys, values, (k, v), sees_context, scale)
        if (shared := q.shape[1] // k.shape[1]) > 1:  # fused kernels want as many keys as queries beside a mask
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        tokens = torch.nn.functional.scaled_dot_product_attention(q, k, v, self._mask, scale=scale)
        return torch.cat([tokens.transpose(1, 2), places], dim=1)


@torch.compiler.disable  # keys and values are found by a layer's number, which compiled layers have to be free of
def attend_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    window_keys: WindowKeys | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As attention functions of transformers: `[B, heads, T, head size]` to `[B, T, heads, head size]`.

    With `window_keys`, `attention_mask` is `[B, 1, N, S]`: the context tokens that a window sees.

    Raises:
        ValueError: the model caps its scores or has attention sinks, which windows know nothing of.
    """
    if window_keys is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return attended, None
    if refused := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise ValueError(
            f"expected plain softmax attention, found {type(module).__name__} with {refused[0]}, which is not "
            "supported: choose another predictor.backbone.path"
        )
    assert attention_mask is not None, "given with window_keys"
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    layer = cast(int, module.layer_idx)
    return window_keys.attend(layer, query, key, value, attention_mask.squeeze(1), scale), None
