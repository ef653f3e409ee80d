"""Backbones for which `plan` can be asked, by their size."""

from __future__ import annotations

from typing import Any

LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
BACKBONES: dict[str, dict[str, Any]] = {
    "1b": LLAMA  # TinyLlama
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": LLAMA  # Llama 2, Vicuna
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": LLAMA  # Llama 2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
