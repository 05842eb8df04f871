"""Tiny configurations by one rule: what is called a width, a number of layers or a vocabulary becomes a small one.

The rule goes by the names of a configuration's fields, nested ones included. Widths that a model divides or multiplies
fit one another: hidden size 32 is 4 heads of 8, of which 2 have keys and values. Lists with an entry for each layer
keep entries of as many kinds as there are layers left.
"""

from __future__ import annotations

import re
from typing import Any

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LENGTH = 2, 32, 48, 4, 2, 8, 128, 64

RULES: list[tuple[str, int]] = [
    (r"(num_hidden|num|n|encoder|decoder|num_encoder|num_decoder)_layers?|depth|num_layers_per_stack", LAYERS),
    (r"num_global_layers|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"num_kv_shared_layers", 0),
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length", LENGTH),
    (r"(n|num)_(attention_)?heads?|num_(encoder|decoder)_attention_heads|(encoder|decoder)_attention_heads", HEADS),
    (r"swa_num_attention_heads|linear_num_value_heads|index_n_heads|linear_num_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads|multi_query_group_num", KV_HEADS),
    (r"(swa_|dim_|linear_|attention_)?head_dim|head_dim|kv_channels|dim_head|d_kv|attention_head_size", HEAD_DIM),
    (r"linear_(key|value)_head_dim|index_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|lru_width|hidden_size_global", HIDDEN),
    (r"hidden_size_per_layer_input|ple_embed_dim|projection_dim|backbone_hidden_size|attention_hidden_size", HIDDEN),
    (r".*intermediate_size.*|(ffn|encoder_ffn|decoder_ffn)_dim|d_ff|n_inner|dff|dim_ff|.*ffn_hidden_size", INNER),
    (r"(q_|kv_|o_)?lora_rank|laurel_rank|gated_norm_rank", 16),
    (r"(num_|n_routed_|num_local_|moe_num_|n_)?experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|experts_per_token|top_?k_experts|index_topk_blocks", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size|window_size", 16),
    (r"index_topk|keep_window_size|block_size|index_block_size", 16),
    (r"(mamba_)?d_state|state_size|ssm_state_size|mamba_d_state", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_ssm", 64),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"chunk_size|mamba_chunk_size|chunk_length", 16),
    (r"n_groups|mamba_n_groups", 1),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"ngram_vocab_size_base", 97),
]
"""What fields become whose whole name matches, where they are larger numbers."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "distilbert": {"dim": HIDDEN, "hidden_dim": INNER},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": INNER,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 16,
        "shape_vocab_size": 64,
    },
    "xlm": {"emb_dim": HIDDEN},
    "xlstm": {"embedding_dim": HIDDEN},
    "xlnet": {"d_head": HEAD_DIM, "d_inner": INNER},
}
"""What the rule does not know of single types."""

PER_LAYER = re.compile(r"layer_types|.*layers?_block_type|mlp_layer_types|.*_layers|.*_per_layer|layer_.*|.*_pattern")


def shrunk(model_type: str) -> Any:
    """A tiny configuration of a type.

    Raises:
        Exception: whatever the configuration's class raises for sizes that it does not take.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]
    return made(**_small(made().to_dict()) | OVERRIDES.get(model_type, {}))


def _small(fields: dict[str, Any]) -> dict[str, Any]:
    """What is None is left out, for the class to derive it from other fields, but for what some classes do not."""
    layers = _layers(fields)
    fields = {name: _UNSET.get(name) if value is None else value for name, value in fields.items()}
    given = {name: value for name, value in fields.items() if value is not None and name not in _DERIVED}
    small = {name: _value(name, value, layers) for name, value in given.items()}
    if "kv_lora_rank" in fields and fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        small["num_key_value_heads"] = HEADS
    return small


_UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}
_DERIVED = {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}


def _layers(fields: dict[str, Any]) -> int | None:
    """How many layers the configuration had, if a field says so."""
    names = re.compile(RULES[0][0])
    return next((value for name, value in fields.items() if names.fullmatch(name) and type(value) is int), None)


def _value(name: str, value: Any, layers: int | None) -> Any:
    if isinstance(value, dict):
        if value and all(str(key).isdigit() for key in value):
            return _of_layers(value)
        return _small(value) if name.endswith("_config") or "model_type" in value else value
    if isinstance(value, list):
        return _fewer(name, value, layers)
    if type(value) is not int:
        return value
    if name.endswith(("token_id", "token_index")):
        return value % VOCABULARY
    small = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), None)
    return value if small is None else min(small, value)


def _of_layers(values: dict[Any, Any]) -> dict[Any, Any]:
    """What is set by the number of a layer, for those that are left."""
    left = {key: value for key, value in values.items() if int(key) < LAYERS}
    return {key: _small(value) if isinstance(value, dict) else value for key, value in left.items()}


def _fewer(name: str, values: list[Any], layers: int | None) -> list[Any]:
    """A list with an entry for each layer: the first entries of different kinds, then the first ones."""
    if name.endswith("token_id"):
        return [value % VOCABULARY for value in values]
    if len(values) != layers and not (len(values) > LAYERS and PER_LAYER.fullmatch(name)):
        return values
    kinds = [value for i, value in enumerate(values) if value not in values[:i]]
    chosen = (kinds + values)[:LAYERS]
    return [_value(name, value, None) for value in sorted(chosen, key=values.index)]
