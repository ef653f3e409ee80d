"""The refiner's decoder layers: new ones of the base model's width, or copies of its last layers."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ptp_lightning.models.attention.dispatch import register_attention
from ptp_lightning.models.layers.decoder_stack import decoder_stack
from ptp_lightning.models.layers.memory_efficient import use_memory_efficient_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEFAULT_EXPANSION = 3  # width of new MLPs in units of the model's width
LAYER_ARGUMENTS = {"attention_mask", "cache", "position_embeddings"}
"""Arguments of the refiner's calls; decoder layers of Llama, Mistral, Qwen and similar models take them."""
MAX_PROBED_TOKENS = 64


def new_layers(
    base: PretrainedConfig, num_layers: int, intermediate_size: int | None
) -> tuple[list[nn.Module], nn.Module]:
    """New Llama layers of the base model's width and number of heads, and their rotary embedding.

    Args:
        base: configuration of the base model.
        num_layers: number of layers.
        intermediate_size: width of the MLPs; None for three times the model's width.

    Raises:
        ValueError: rotary embeddings do not fit heads of the base model's size.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    hidden_size, num_heads = cast(int, base.hidden_size), cast(int, base.num_attention_heads)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"expected a base model whose width is a multiple of twice its number of heads, found {hidden_size} and "
            f"{num_heads}: set predictor.correction to null"
        )
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or DEFAULT_EXPANSION * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        attn_implementation=register_attention(),  # pyright: ignore[reportCallIssue]  taken by every configuration
    )
    return [LlamaDecoderLayer(config, index) for index in range(num_layers)], LlamaRotaryEmbedding(config)


def last_layers(model: PreTrainedModel, num_layers: int) -> tuple[list[nn.Module], nn.Module]:
    """Trainable float32 copies of the base model's last layers, and a copy of its rotary embedding.

    Raises:
        ValueError: the base model has fewer layers, or its layers take other arguments than Llama's.
    """
    new_instead = "set predictor.correction.init_args.start to random"
    decoder, _, layers = decoder_stack(model, num_layers, "predictor.correction.init_args.num_layers", new_instead)
    rotary: nn.Module | None = getattr(decoder, "rotary_emb", None)
    if rotary is None or not set(inspect.signature(layers[-1].forward).parameters) >= LAYER_ARGUMENTS:
        raise ValueError(
            f"expected layers with the arguments of Llama's layers, found {type(layers[-1]).__name__}: {new_instead}"
        )
    copies: list[nn.Module] = [copy.deepcopy(layer) for layer in list(layers)[-num_layers:]]
    for index, layer in enumerate(copies):
        layer.float().requires_grad_(True)
        use_memory_efficient_layers(layer)
        for part in layer.modules():
            if hasattr(part, "config"):  # the layer's own copy
                cast(Any, part).config._attn_implementation = register_attention()
            if hasattr(part, "layer_idx"):
                cast(Any, part).layer_idx = index  # where a cache holds its keys and values
    return copies, copy.deepcopy(rotary)


@torch.no_grad()
def stream_scale(model: PreTrainedModel, num_layers: int) -> float:
    """Root mean square of the input of the base model's last layers, over a sample of its vocabulary."""
    vocab_size = cast(int, model.config.vocab_size)
    longest = cast("int | None", getattr(model.config, "max_position_embeddings", None)) or MAX_PROBED_TOKENS
    count = min(MAX_PROBED_TOKENS, vocab_size, longest)
    token_ids = (torch.arange(count, device=model.device) * vocab_size // count).unsqueeze(0)
    states = model(input_ids=token_ids, use_cache=False, output_hidden_states=True).hidden_states
    return float(states[-1 - num_layers].float().square().mean().sqrt())
