"""Tiny random causal language models of the families the package supports, for tests."""

from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SEED = 0
_Model = TypeVar("_Model", bound=torch.nn.Module)


def _build(config: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedModel:
    """A float32 model in eval mode with sdpa attention; equal arguments give equal weights up to rounding."""
    config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "use_cache": True} | config | overrides
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), attn_implementation="sdpa", dtype=torch.float32
        )
        for parameter in model.parameters():  # the default initialisation is so small that errors would hide
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def cast_weights(model: _Model, dtype: torch.dtype) -> _Model:
    """The same model with rounded weights, as `from_pretrained(dtype=...)` has them: buffers (rotary) stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _rotary(model_type: str, vocab_size: int, hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }


def tiny_family(model_type: str, **fields: Any) -> PreTrainedModel:
    """Any family; `fields` are further configuration fields, or `...` for a usual one that the family does not have."""
    config = _rotary(model_type, vocab_size=64, hidden_size=32, num_layers=2)
    absent = {name for name, value in fields.items() if value is ...}
    return _build(
        {name: value for name, value in config.items() if name not in absent},
        {name: value for name, value in fields.items() if name not in absent},
    )


def tiny_llama(vocab_size: int = 64, hidden_size: int = 32, num_layers: int = 2, **kw: Any) -> PreTrainedModel:
    """Rotary positions, grouped-query attention; `kw` are further configuration fields."""
    return _build(_rotary("llama", vocab_size, hidden_size, num_layers), kw)


def tiny_qwen2(vocab_size: int = 64, hidden_size: int = 32, num_layers: int = 2, **kw: Any) -> PreTrainedModel:
    """Like `tiny_llama`, with biases on query, key and value."""
    return _build(_rotary("qwen2", vocab_size, hidden_size, num_layers), kw)


def tiny_qwen3(vocab_size: int = 64, hidden_size: int = 32, num_layers: int = 2, **kw: Any) -> PreTrainedModel:
    """Like `tiny_llama`, with normalised queries and keys."""
    config = _rotary("qwen3", vocab_size, hidden_size, num_layers) | {"head_dim": hidden_size // 4}
    return _build(config, kw)


def tiny_gpt2(vocab_size: int = 64, hidden_size: int = 32, num_layers: int = 2, **kw: Any) -> PreTrainedModel:
    """Learned positions, `Conv1D` instead of `Linear` layers, tied output embedding."""
    config = {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_embd": hidden_size,
        "n_layer": num_layers,
        "n_head": 4,
        "n_positions": 256,
    }
    return _build(config, kw)


def tiny_gpt_neox(vocab_size: int = 64, hidden_size: int = 32, num_layers: int = 2, **kw: Any) -> PreTrainedModel:
    """Fused query-key-value projection, parallel residual, partly rotary positions."""
    config = {
        "model_type": "gpt_neox",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    return _build(config, kw)


TINY_MODELS = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
    "gpt_neox": tiny_gpt_neox,
}
"""Every family by its transformers `model_type`, for `pytest.mark.parametrize`."""
