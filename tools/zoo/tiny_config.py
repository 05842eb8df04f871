"""Tiny configurations of any model type: fields that hold a size, such as a width or a number of layers, are reduced.

Fields are found by name, also in nested configs. The sizes are consistent with each other: hidden size 32 is 4 heads
of head dimension 8, with 2 key-value heads. Lists with one entry per layer are cut to as many different entries as
there are layers left.
"""

from __future__ import annotations

import re
from typing import Any

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LENGTH = 2, 32, 48, 4, 2, 8, 128, 64
IMAGE, PATCH = 32, 8

SIZES: list[tuple[str, int]] = [
    (
        r"(num_hidden|num|n|encoder|decoder|num_encoder|num_decoder)_layers?|depths?|num_blocks|num_layers_per_stack",
        LAYERS,
    ),
    (r"num_global_layers|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"num_layers_per_stack", LAYERS),
    (r"num_kv_shared_layers", 0),
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length", LENGTH),
    (r"(n|num)_(attention_)?heads?|num_(encoder|decoder)_attention_heads|(encoder|decoder)_attention_heads", HEADS),
    (r"swa_num_attention_heads|linear_num_value_heads|index_n_heads|linear_num_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads|multi_query_group_num", KV_HEADS),
    (r"(swa_|dim_|linear_|attention_)?head_dim|head_dim|kv_channels|dim_head|d_kv|attention_head_size", HEAD_DIM),
    (r"linear_(key|value)_head_dim|index_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (
        r".*intermediate_size.*|(ffn|encoder_ffn|decoder_ffn)_dim|d_ff|n_inner|dff|dim_ff|.*ffn_hidden_size",
        INTERMEDIATE,
    ),
    (r"mlp_dim|feed_forward_size", INTERMEDIATE),
    (r"patch_embed_hidden_size", 3 * PATCH * PATCH),
    (r".*hidden_sizes?|.*embed(ding)?_dims?|d_model|n_embd|embedding_size|word_embed_proj_dim|lru_width", HIDDEN),
    (r"hidden_size_global|hidden_size_per_layer_input|(hidden|conv|tdnn)_dim", HIDDEN),
    (r"(projector_input|projector_output|projection|output_proj)_dims?", HIDDEN),
    (r"(output|conv|downsample)_channels", HIDDEN),
    (r"num_position_embeddings|max_num_patches", (IMAGE // PATCH) ** 2),
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
    (r"image_size|crop_size", IMAGE),
    (r"patch_size", PATCH),
    (r"max_length", 2 * LENGTH),
    (r"ngram_vocab_size_base", 97),
]
"""Upper bounds of fields, by a pattern that the whole name matches; the first match counts."""

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
    "distilbert": {"dim": HIDDEN, "hidden_dim": INTERMEDIATE},
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
        "feed_forward_size": INTERMEDIATE,
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
    "xlnet": {"d_head": HEAD_DIM, "d_inner": INTERMEDIATE},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
    },
    "zamba2": {"attention_hidden_size": 64},
}
"""Further fields of single model types, which `SIZES` does not get right."""

LAYER_INDICES = r".*_ind(ex|ic)es|vision_feature_layers?|.*_layer_ids"
"""Fields with a list of layer indices."""
PER_LAYER = re.compile(r"layer_types|.*layers?_block_type|mlp_layer_types|.*_layers|.*_per_layer|layer_.*|.*_pattern")
REQUIRED_SUBCONFIGS = ("text_config", "vision_config")
"""Nested configs that are created where they are None by default, because a model lacks that part without them."""


_IF_NONE: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "vocab_size": VOCAB,
    "image_token_index": 5,
    "image_token_id": 5,
    "audio_token_id": 6,
}
"""Values of fields that some config classes do not derive from other fields if they are None."""
_DROPPED = {
    "architectures",
    "out_features",
    "out_indices",
    "stage_names",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
}
"""Fields that config classes derive from other fields, or that have nothing to do with the architecture."""


def tiny_config(model_type: str) -> Any:
    """Return a tiny config of a model type.

    Raises:
        Exception: anything that the config class raises for sizes that it does not accept.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    fields = config_class().to_dict()
    del fields["model_type"]
    for name, subconfig_class in config_class.sub_configs.items():
        if name in REQUIRED_SUBCONFIGS and fields.get(name) is None:
            fields[name] = subconfig_class().to_dict()
    reduced = _reduce_fields(fields)
    rope = reduced.get("text_config", {}).get("rope_parameters", {})
    if "rope_type" in rope:
        rope.setdefault("mrope_section", _mrope_section(rope))  # the default of some models needs the full head_dim
    return config_class(**_merge(reduced, OVERRIDES.get(model_type, {})))


def _mrope_section(rope: dict[str, Any]) -> list[int]:
    """Return the numbers of rotary frequencies for time, height and width."""
    frequencies = int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2
    return [frequencies - 2 * (frequencies // 3), frequencies // 3, frequencies // 3]


def _merge(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return fields with overrides applied, recursively."""
    nested = {name: _merge(fields.get(name) or {}, value) for name, value in overrides.items() if type(value) is dict}
    return fields | overrides | nested


def _reduce_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Reduce the fields of a config. Those that are None are left out, so that the class derives them from others,
    except for those in `_IF_NONE`."""
    layers = _num_layers(fields)
    fields = {name: _IF_NONE.get(name) if value is None else value for name, value in fields.items()}
    kept = {name: value for name, value in fields.items() if value not in (None, {}) and name not in _DROPPED}
    reduced = {name: _reduce(name, value, layers) for name, value in kept.items()}
    if "mrope_section" in fields:
        reduced["mrope_section"] = _mrope_section(fields)
    if "kv_lora_rank" in fields and fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        reduced["num_key_value_heads"] = HEADS
    return reduced


def _num_layers(fields: dict[str, Any]) -> int | None:
    """Return the original number of layers, or None if no field holds it."""
    names = re.compile(SIZES[0][0])
    return next((value for name, value in fields.items() if names.fullmatch(name) and type(value) is int), None)


def _reduce(name: str, value: Any, layers: int | None) -> Any:
    if isinstance(value, dict):
        if value and all(str(key).isdigit() for key in value):
            return _reduce_by_layer(value)
        is_config = name.endswith("_config") or {"model_type", "rope_type"} & set(value)
        return _reduce_fields(value) if is_config else value
    if name == "image_grid_pinpoints":
        return [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
    if isinstance(value, list) and re.fullmatch(LAYER_INDICES, name):
        return list(range(min(LAYERS, len(value))))
    if isinstance(value, list):
        return _reduce_list(name, value, layers)
    if type(value) is not int:
        return value
    if name.endswith(("token_id", "token_index")):
        return value % VOCAB
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return value if size is None else min(size, value)


def _reduce_by_layer(values: dict[Any, Any]) -> dict[Any, Any]:
    """Reduce a dict with layer indices as keys."""
    kept = {key: value for key, value in values.items() if int(key) < LAYERS}
    return {key: _reduce_fields(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _reduce_list(name: str, values: list[Any], layers: int | None) -> list[Any]:
    """Reduce a list; one with an entry per layer keeps as many different entries as possible, in their order."""
    if name.endswith("token_id"):
        return [value % VOCAB for value in values]
    if len(values) != layers and not (len(values) > LAYERS and PER_LAYER.fullmatch(name)):
        return [_reduce(name, value, None) if type(value) is int else value for value in values]
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    kept = (distinct + values)[:LAYERS]
    return [_reduce(name, value, None) for value in sorted(kept, key=values.index)]
