"""A tiny random model of any causal LM family that transformers has, from its own registry, for tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptp_lightning.models.backbone import BackboneSettings, load_backbone

FAMILIES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every `model_type` that `AutoModelForCausalLM` builds."""
MAX_PARAMETERS = 4_000_000
VOCAB_SIZE = 64

HIDDEN, HEADS, HEAD_DIM, LAYERS, POSITIONS, INTERMEDIATE = 32, 4, 8, 2, 256, 48
_SIZES: list[tuple[Any, str]] = [
    (VOCAB_SIZE, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (
        HIDDEN,
        "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim embedding_dim input_embedding_size "
        "output_embedding_size attention_hidden_size backbone_hidden_size lru_width",
    ),
    (
        HEADS,
        "num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads num_heads attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads "
        "linear_num_heads",
    ),
    (2, "num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads num_query_groups"),
    (
        HEAD_DIM,
        "head_dim swa_head_dim v_head_dim qk_nope_head_dim index_head_dim dim_head d_head linear_key_head_dim "
        "linear_value_head_dim linear_head_dim attention_head_size kv_channels mamba_head_dim mamba_d_head "
        "mamba_headdim query_pre_attn_scalar",
    ),
    (
        INTERMEDIATE,
        "intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim decoder_ffn_dim "
        "encoder_ffn_dim ffn_hidden_size dff dim_ff d_inner feed_forward_size intermediate_size_mlp "
        "shared_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size dense_intermediate_size router_hidden_size",
    ),
    (
        LAYERS,
        "num_hidden_layers decoder_layers encoder_layers n_layer n_layers num_layers num_blocks num_decoder_layers "
        "num_encoder_layers",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions "
        "max_source_positions context_length",
    ),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num qk_rope_head_dim rotary_dim"),
    (4, "linear_num_value_heads mamba_n_heads mamba_num_heads n_mamba_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    (1, "n_group num_expert_group topk_group"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank"),
    (HEAD_DIM + 4, "qk_head_dim sliding_window sliding_window_size attention_window_size window_size"),
    (8, "mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id"),
    (2, "eos_token_id sep_token_id"),
    (True, "is_decoder"),
]
FIELDS: dict[str, Any] = {name: value for value, names in _SIZES for name in names.split()}
"""Tiny values of configuration fields, by name; a family gets those that its configuration has."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": INTERMEDIATE, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "zamba2": {"layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields of families to which `FIELDS` do not apply."""

NOT_BUILT: dict[str, str] = {
    "dots3_note": "a model of images and sounds; its three configurations depend on each other",
    "dots3_note_text": "sizes of its sliding layers are no fields of its configuration",
    "gemma3n": "a model of images and sounds, which needs the package timm",
    "gemma4_assistant": "its default configuration is refused by transformers",
    "musicgen": "an encoder and a decoder of sounds; transformers builds none from its configuration",
    "musicgen_melody": "an encoder and a decoder of sounds; transformers builds none from its configuration",
    "qwen4_exp": "a model of images; its configuration of texts has no defaults",
}
"""Families without a tiny model here, and why."""


def family_config(model_type: str) -> dict[str, Any]:
    """Fields of a tiny configuration, for `AutoConfig.for_model`."""
    default = AutoConfig.for_model(model_type)
    return {"model_type": model_type} | _tiny_fields(default) | OVERRIDES.get(model_type, {})


def require_tiny(entries: dict[str, Any]) -> None:
    """Raise ValueError if the model would be large, and whatever transformers raises if it cannot build one."""
    config = AutoConfig.for_model(**entries)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its smallest configuration here has {size:,} parameters")


def build_family(entries: dict[str, Any]) -> PreTrainedModel:
    """A float32 model in eval mode, as the package loads it, with weights so large that errors show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_backbone(BackboneSettings(from_config=entries))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 1:  # biases are zero at first, and factors of norms one
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _tiny_fields(default: PreTrainedConfig) -> dict[str, Any]:
    own = {entry.name for entry in fields(default)}
    values = {name: value for name, value in default.to_dict().items() if name in own}
    tiny = {name: value for name, value in FIELDS.items() if isinstance(values.get(name), int)}
    if "kv_lora_rank" in values and "num_key_value_heads" in tiny:  # latent attention has no grouped queries
        tiny["num_key_value_heads"] = HEADS
    # One layer of each kind, in the order in which they come first.
    kinds = {name: list(dict.fromkeys(values.get(name) or [])) for name in ("layer_types", "mlp_layer_types")}
    num_layers = max(LAYERS, *map(len, kinds.values()))
    if num_layers > LAYERS:
        tiny["num_hidden_layers"] = num_layers
    for name, some in kinds.items():
        if some and values.get("num_hidden_layers"):
            tiny[name] = [some[k % len(some)] for k in range(num_layers)]
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            tiny[name] = {"model_type": part.model_type} | _tiny_fields(part)
    return tiny
