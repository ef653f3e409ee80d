"""JoinedDecoder: the stack of a Llama-like model on a CPU, with few operations a layer and exact for tokens.

A call of decoding reads few rows, so that most of its time is spent on the number of operations. Here queries, keys and
values of a layer are one product, and so are the two halves of its MLP; the adapters of each are joined likewise.

Tokens and slots are separate rows. The hidden state of a token has the same bits whatever other rows there are:

* products are row-invariant (`PackedLinear`), and adapters are added to the rows of slots alone;
* tokens attend in `AlignedBlocks`;
* norms reduce each row by itself, and so do activations in parts that are too small to be divided among threads;
* rotations are read from a table.

A prompt is read otherwise: each text alone, in one piece, by products and attention of many rows (`prefill`). It has
the same bits in every decoder and in every batch, because it is the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.decoding.joined_calls import Call, DecodingCall, PromptCall, Rotations, TreeCall
from ptp_lightning.decoding.ragged_cache import RaggedCache
from ptp_lightning.decoding.token_tree import TokenTree
from ptp_lightning.models.attention.sliding_window import has_sliding_window
from ptp_lightning.models.layers.packed_linear import PackedLinear, PackedWeights, is_packable, packs_weights
from ptp_lightning.models.layers.quantized_linear import QuantizedLinear
from ptp_lightning.models.layers.replacement import full_name
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear
from ptp_lightning.models.lora.joined_adapter import JoinedAdapter, base_layer, kept_merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED_LAYERS = frozenset(
    {
        "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
        "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
        "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
        "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
    }
)
"""Decoder layers of transformers that compute what `_JoinedLayer` computes."""
STATIC_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Types of rotary positions whose angles depend on the position alone, not on the length of the text."""
MAX_SERIAL_SIZE = 2**15 - 1
"""torch divides elementwise operations on more numbers among threads, wherever that falls within a row."""


class JoinedDecoder:
    """Runs the decoder of a model on tokens and slots of a batch.

    Args:
        model: of which `is_supported` holds. It is not changed.
        packed_weights: keeps the packed weights.
        first_slot_layer: index of the layer at which slots enter.

    Attributes:
        entry_hidden: `[M, H]`, what that layer read of the tokens of the latest call; None for the first layer.
    """

    def __init__(self, model: PreTrainedModel, packed_weights: PackedWeights, first_slot_layer: int = 0) -> None:
        decoder: Any = getattr(model, model.base_model_prefix)
        pack = packs_weights(model)
        self._layers = [_JoinedLayer(layer, packed_weights, pack) for layer in decoder.layers]
        self._norm = _RowNorm(decoder.norm)
        self._rotations = Rotations(decoder.rotary_emb, model.dtype)
        self._first_slot_layer = first_slot_layer
        self._latest_tree: TreeCall | None = None
        self.entry_hidden: Tensor | None = None

    @staticmethod
    def is_supported(model: PreTrainedModel) -> bool:
        """Whether a model is on a CPU, and each of its layers is one of `SUPPORTED_LAYERS` with full attention."""
        decoder: Any = getattr(model, model.base_model_prefix)
        layers = getattr(decoder, "layers", ())
        if not layers or any(full_name(type(layer)) not in SUPPORTED_LAYERS for layer in layers):
            return False
        if has_sliding_window(model.config):
            return False
        linear = [module for name, module in decoder.layers.named_modules() if name.endswith(_LINEAR_LAYERS)]
        return getattr(decoder.rotary_emb, "rope_type", None) in STATIC_ROTATIONS and all(
            is_packable(layer.get_base_layer() if isinstance(layer, GatedLoraLinear) else layer) for layer in linear
        )

    def prefill(self, tokens: Tensor, row: int, cache: RaggedCache) -> Tensor:
        """Read the beginning of one text; its keys and values are written to a row that has no tokens yet.

        Args:
            tokens: `[T, H]`, input embeddings.
            row: of the cache.
            cache: of this stack.

        Returns:
            Last hidden states `[T, H]`.
        """
        return self._run(tokens, PromptCall(tokens, row, cache, self._rotations))

    def run(
        self,
        tokens: Tensor,
        slots: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: RaggedCache,
        tree: TokenTree | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One call; keys and values of tokens and slots are written after the kept tokens of each row.

        Those of a tree are written by `write_path`.

        Args:
            tokens: `[B, T, H]`, input embeddings.
            slots: `[B, S, H]`, likewise.
            position_ids: `[B, T + S]`.
            mask: `[B, 1, T + S, max(cache.lengths) + T + S]`, true where a query sees a key.
            cache: of this stack.
            tree: of the tokens, if they are one; then there are no slots.

        Returns:
            Last hidden states `[B, T, H]` and `[B, S, H]`.
        """
        num_groups = self._layers[0].num_groups
        if tree is None:
            call = DecodingCall(tokens, slots, position_ids, mask, cache, self._rotations, num_groups)
        else:
            assert slots.shape[1] == 0, "slots follow no tree"
            call = TreeCall(tokens, tree, position_ids, cache, self._rotations, num_groups)
            self._latest_tree = call
        hidden = self._run(torch.cat([tokens.flatten(0, 1), slots.flatten(0, 1)]), call)
        return hidden[: call.num_token_rows].view(tokens.shape), hidden[call.num_token_rows :].view(slots.shape)

    def run_late_slots(self, slots: Tensor, position_ids: Tensor, mask: Tensor, cache: RaggedCache) -> Tensor:
        """Run slots through the last layers alone; they follow the kept tokens of each row.

        Args:
            slots: `[B, S, H]`, what the layer reads at which they enter.
            position_ids: `[B, S]`.
            mask: `[B, 1, S, max(cache.lengths) + S]`.
            cache: of this stack; the next call overwrites the keys and values of the slots.

        Returns:
            Last hidden states `[B, S, H]`.
        """
        num_groups = self._layers[0].num_groups
        call = DecodingCall(slots[:, :0], slots, position_ids, mask, cache, self._rotations, num_groups)
        return self._run(slots.flatten(0, 1), call, self._first_slot_layer).view(slots.shape)

    def _run(self, hidden: Tensor, call: Call, first_layer: int = 0) -> Tensor:
        """Last hidden states of rows `[M, H]`."""
        self.entry_hidden = None
        for index, layer in enumerate(self._layers[first_layer:], first_layer):
            if index == self._first_slot_layer > first_layer:
                self.entry_hidden = hidden
            hidden = layer.run(hidden, index, call)
        return self._norm(hidden)

    def write_path(self, columns: Sequence[Sequence[int]]) -> None:
        """Write keys and values of a path of the latest tree after the kept tokens of each row.

        Args:
            columns: of the tokens of each row.
        """
        assert self._latest_tree is not None, "no tree was read"
        self._latest_tree.write_path(columns)
        self._latest_tree = None


_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
_LINEAR_LAYERS = (*_QUERY_KEY_VALUE, *_OUTPUT, *_GATE_UP, *_DOWN)


class _JoinedLayer:
    """One decoder layer."""

    def __init__(self, layer: nn.Module, packed_weights: PackedWeights, pack: bool) -> None:
        attention: Any = layer.get_submodule("self_attn")
        self._query_key_value, self._output, self._gate_up, self._down = (
            _JoinedProduct([layer.get_submodule(name) for name in names], packed_weights, pack)
            for names in (_QUERY_KEY_VALUE, _OUTPUT, _GATE_UP, _DOWN)
        )
        self._input_norm = _RowNorm(layer.get_submodule("input_layernorm"))
        self._mlp_norm = _RowNorm(layer.get_submodule("post_attention_layernorm"))
        self._head_norms = [
            _RowNorm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)
        ]
        self._activation = layer.get_submodule("mlp.act_fn")
        self._head_size: int = attention.head_dim
        self._scale: float = attention.scaling
        num_queries, self._num_keys = (
            len(base_layer(layer.get_submodule(name)).weight) // self._head_size for name in _QUERY_KEY_VALUE[:2]
        )
        self.num_groups = num_queries // self._num_keys

    def run(self, hidden: Tensor, index: int, call: Call) -> Tensor:
        """`[M, H]` to the same; rows of tokens come first."""
        joined = self._query_key_value(self._input_norm(hidden), call)
        rotated, value = joined.unflatten(1, (-1, self._head_size)).tensor_split((-self._num_keys,), dim=1)
        if self._head_norms:
            parts = zip(self._head_norms, rotated.tensor_split((-self._num_keys,), dim=1), strict=True)
            rotated = torch.cat([norm(heads) for norm, heads in parts], dim=1)
        query, key = _rotate(rotated, call).tensor_split((-self._num_keys,), dim=1)
        attended = call.attend(index, query, key, value, self._scale)
        hidden = hidden + self._output(attended, call)
        gate_up = self._gate_up(self._mlp_norm(hidden), call)
        return hidden + self._down(_gated(gate_up, self._activation), call)


class _JoinedProduct:
    """Linear layers with the same input, with their adapters at the rows of slots.

    A call of slots alone uses weights with which the adapters are merged, if there is memory for packed copies.
    """

    def __init__(self, layers: list[nn.Module], packed_weights: PackedWeights, pack: bool) -> None:
        bases = [base_layer(layer) for layer in layers]
        self._merged = partial(kept_merged, layers, packed_weights) if pack else None
        self._of_slots: PackedLinear | QuantizedLinear | None = None
        self._linear = packed_weights.linear(*bases, pack=pack)
        self._adapter = JoinedAdapter.kept(layers, bases[0].weight.dtype, pack, packed_weights)

    def __call__(self, rows: Tensor, call: Call) -> Tensor:
        """`[M, in]` to `[M, out]`; the adapters act on the rows of slots."""
        start = call.num_token_rows
        if start == 0 and self._merged is not None:
            if self._of_slots is None:
                self._of_slots = self._merged()
            return self._of_slots(rows)
        output = self._linear.whole(rows) if call.is_whole else self._linear(rows)
        if start < rows.shape[0]:
            self._adapter.add_(output[start:], rows[start:])
        return output


class _RowNorm:
    """An RMS norm of transformers, which reduces each row by itself; rounded where transformers' own is.

    torch has no kernel of it on a CPU, and its ten operations take longer than the layer norm of `[x, -x]`, whose mean
    is zero: that is the RMS norm of x.
    """

    def __init__(self, norm: Any) -> None:
        self._weight: Tensor = norm.weight.detach()
        self._epsilon: float = norm.variance_epsilon
        self._shape = (2 * len(self._weight),)

    def __call__(self, rows: Tensor) -> Tensor:
        """`[..., H]` to the same."""
        mirrored = torch.cat([rows, rows.neg()], dim=-1)
        normed, _ = F.layer_norm(mirrored, self._shape, eps=self._epsilon).chunk(2, dim=-1)
        return normed * self._weight


def _rotate(heads: Tensor, call: Call) -> Tensor:
    """Rotate the halves of heads `[M, heads, D]` against each other, with the roundings of transformers."""
    return heads * call.cos + heads.roll(heads.shape[2] // 2, dims=2) * call.sin


def _gated(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`activation(gate) * up`, `[M, 2 I]` to `[M, I]`."""
    gate, up = gate_up.chunk(2, dim=1)
    if gate.numel() <= MAX_SERIAL_SIZE:
        return activation(gate) * up
    size = max(MAX_SERIAL_SIZE // gate.shape[1], 1)
    return torch.cat([activation(part) for part in gate.split(size)]) * up
