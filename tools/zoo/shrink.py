"""Tiny configurations by one rule: what is called a width, a number of layers or a vocabulary becomes a small one.

The rule goes by the names of a configuration's fields, nested ones included. Widths that a model divides or multiplies
fit one another: hidden size 32 is 4 heads of 8, of which 2 have keys and values. Lists with an entry for each layer
keep entries of as many kinds as there are layers left.
"""

from __future__ import annotations

import re
from typing import Any

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LENGTH = 2, 32, 48, 4, 2, 8, 128, 64
PICTURE, PATCH = 32, 8

RULES: list[tuple[str, int]] = [
    (
        r"(num_hidden|num|n|encoder|decoder|num_encoder|num_decoder)_layers?|depths?|num_blocks|num_layers_per_stack",
        LAYERS,
    ),
    (r"num_global_layers|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"num_layers_per_stack", LAYERS),
    (r"num_kv_shared_layers", 0),
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length", LENGTH),
    (r"(n|num)_(attention_)?heads?|num_(encoder|decoder)_attention_heads|(encoder|decoder)_attention_heads", HEADS),
    (r"swa_num_attention_heads|linear_num_value_heads|index_n_heads|linear_num_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads|multi_query_group_num", KV_HEADS),
    (r"(swa_|dim_|linear_|attention_)?head_dim|head_dim|kv_channels|dim_head|d_kv|attention_head_size", HEAD_DIM),
    (r"linear_(key|value)_head_dim|index_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r".*intermediate_size.*|(ffn|encoder_ffn|decoder_ffn)_dim|d_ff|n_inner|dff|dim_ff|.*ffn_hidden_size", INNER),
    (r"mlp_dim|feed_forward_size", INNER),
    (r"patch_embed_hidden_size", 3 * PATCH * PATCH),
    (r".*hidden_sizes?|.*embed(ding)?_dims?|d_model|n_embd|embedding_size|word_embed_proj_dim|lru_width", HIDDEN),
    (r"hidden_size_global|hidden_size_per_layer_input|(hidden|conv|tdnn)_dim", HIDDEN),
    (r"(projector_input|projector_output|projection|output_proj)_dims?", HIDDEN),
    (r"(output|conv|downsample)_channels", HIDDEN),
    (r"num_position_embeddings|max_num_patches", (PICTURE // PATCH) ** 2),
    (r"mm_tokens_per_image", 4),
    (r"(q_|kv_|o_)?lora_rank|laurel_rank|gated_norm_rank", 16),
    (r"(num_|n_routed_|num_local_|moe_num_|n_)?experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|experts_per_token|top_?k_experts|index_topk_blocks", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size|window_size", 16),
    (r"index_topk|keep_window_size|block_size|index_block_size", 16),
    (r"(mamba_)?d_state|state_size|ssm_state_size|mamba_d_state", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_?dim", 16),
    (r"mamba_d_ssm", 64),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"chunk_size|mamba_chunk_size|chunk_length|context_size|n_window", 16),
    (r"n_groups|mamba_n_groups", 1),
    (r"image_size|crop_size", PICTURE),
    (r"patch_size", PATCH),
    (r"max_length", 2 * LENGTH),
    (r"ngram_vocab_size_base", 97),
]
"""What fields become whose whole name matches, where they are larger numbers."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 1,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 97, "use_cache": False},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "distilbert": {"dim": HIDDEN, "hidden_dim": INNER},
    "donut-swin": {"num_heads": [2, 2, 4, 4], "window_size": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "falcon_h1": {"mamba_d_head": 16},
    "glmasr": {"audio_config": {"intermediate_size": 4 * HIDDEN}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config": {"intermediate_size": 4 * HIDDEN, "vision_output_dim": HIDDEN}},
    "mamba2": {"head_dim": 16},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"vision_output_dim": 3 * HIDDEN},
    },
    "muse_glimmer": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark": {"out_hidden_size": 4 * HIDDEN},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
    "nemotron_h_omni": {"text_config": {"layers_block_type": ["linear_attention", "full_attention"]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    "qwen2_audio": {"ignore_index": -100},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
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
    "step3p7": {"text_config": {"sliding_window": 16}},
    "swin": {"num_heads": [2, 2, 4, 4], "window_size": 2},
    "swinv2": {"num_heads": [2, 2, 4, 4]},
    "voxtral": {"audio_config": {"intermediate_size": 4 * HIDDEN}},
    "xlm": {"emb_dim": HIDDEN},
    "xlnet": {"d_head": HEAD_DIM, "d_inner": INNER},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
    },
    "zamba2": {"attention_hidden_size": 64},
}
"""What the rule does not know of single types."""

CHOSEN = r".*_ind(ex|ic)es|vision_feature_layers?|.*_layer_ids"
"""Lists of the numbers of some layers."""
PER_LAYER = re.compile(r"layer_types|.*layers?_block_type|mlp_layer_types|.*_layers|.*_per_layer|layer_.*|.*_pattern")
INSIDE = ("text_config", "vision_config")
"""Configurations without which a model has no such part."""


def shrunk(model_type: str) -> Any:
    """A tiny configuration of a type.

    Raises:
        Exception: whatever the configuration's class raises for sizes that it does not take.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]
    fields = made().to_dict()
    del fields["model_type"]
    for name, inside in made.sub_configs.items():
        if name in INSIDE and fields.get(name) is None:
            fields[name] = inside().to_dict()
    small = _small(fields)
    rope = small.get("text_config", {}).get("rope_parameters", {})
    if "rope_type" in rope:
        rope.setdefault("mrope_section", _sections(rope))  # what is of full width where a model looks for it in vain
    return made(**_merged(small, OVERRIDES.get(model_type, {})))


def _sections(rope: dict[str, Any]) -> list[int]:
    """Which frequencies of a rotary embedding are for time, height and width."""
    frequencies = int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2
    return [frequencies - 2 * (frequencies // 3), frequencies // 3, frequencies // 3]


def _merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """With others in their place, inside too."""
    inside = {name: _merged(fields.get(name) or {}, value) for name, value in more.items() if isinstance(value, dict)}
    return fields | more | inside


def _small(fields: dict[str, Any]) -> dict[str, Any]:
    """What is None is left out, for the class to derive it from other fields, but for what some classes do not."""
    layers = _layers(fields)
    fields = {name: _UNSET.get(name) if value is None else value for name, value in fields.items()}
    given = {name: value for name, value in fields.items() if value not in (None, {}) and name not in _DERIVED}
    small = {name: _value(name, value, layers) for name, value in given.items()}
    if "mrope_section" in fields:
        small["mrope_section"] = _sections(fields)
    if "kv_lora_rank" in fields and fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        small["num_key_value_heads"] = HEADS
    return small


_UNSET: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "image_token_index": 5,
    "image_token_id": 5,
    "audio_token_id": 6,
}
_DERIVED = {
    "architectures",
    "out_features",
    "out_indices",
    "stage_names",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
}


def _layers(fields: dict[str, Any]) -> int | None:
    """How many layers the configuration had, if a field says so."""
    names = re.compile(RULES[0][0])
    return next((value for name, value in fields.items() if names.fullmatch(name) and type(value) is int), None)


def _value(name: str, value: Any, layers: int | None) -> Any:
    if isinstance(value, dict):
        if value and all(str(key).isdigit() for key in value):
            return _of_layers(value)
        of_its_own = name.endswith("_config") or {"model_type", "rope_type"} & set(value)
        return _small(value) if of_its_own else value
    if name == "image_grid_pinpoints":
        return [[PICTURE, 2 * PICTURE], [2 * PICTURE, PICTURE]]
    if isinstance(value, list) and re.fullmatch(CHOSEN, name):
        return list(range(min(LAYERS, len(value))))
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
        return [_value(name, value, None) if type(value) is int else value for value in values]
    kinds = [value for i, value in enumerate(values) if value not in values[:i]]
    chosen = (kinds + values)[:LAYERS]
    return [_value(name, value, None) for value in sorted(chosen, key=values.index)]
