"""The models whose step is measured: the sizes of `shapes.py`, with the other settings of their published configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastlora.tools.bench.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Model:
    """An architecture of transformers with the sizes of a shape.

    Attributes:
        layers: number of layers of the published model.
        settings: fields of its config besides the sizes.
        post_norms: whether there are norms after attention and MLP as well as before them.
        head_norms: whether the heads of queries and keys are normalized.
    """

    shape: Shape
    model_type: str
    layers: int
    settings: dict[str, Any] = field(default_factory=dict)
    post_norms: bool = False
    head_norms: bool = False

    def config(self, layers: int) -> Any:
        """Return the config with this number of layers."""
        from transformers import AutoConfig

        shape = self.shape
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            **self.settings,
        )


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **scaling}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS = {
    model.shape.name: model
    for model in (
        Model(
            SHAPES["Llama-3.1-8B"],
            "llama",
            32,
            {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_parameters": _rope(5e5, **_LLAMA3)},
        ),
        Model(
            SHAPES["Qwen2.5-7B"],
            "qwen2",
            28,
            {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "rope_parameters": _rope(1e6)},
        ),
        Model(
            SHAPES["Gemma-2-9B"],
            "gemma2",
            42,
            {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 8192,
                "rope_parameters": _rope(1e4),
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "tie_word_embeddings": True,
            },
            post_norms=True,
        ),
        Model(
            Shape("Qwen3-8B", 4096, 12288, 32, 8, 128, 151936),
            "qwen3",
            36,
            {"rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_parameters": _rope(1e6)},
            head_norms=True,
        ),
        # For CPUs. With a smaller initializer_range, activations of random weights of this width would vanish.
        Model(
            Shape("tiny", 64, 192, 4, 2, 16, 512),
            "llama",
            2,
            {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "initializer_range": 0.15},
        ),
    )
}
