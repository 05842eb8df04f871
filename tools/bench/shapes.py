"""Sizes of popular models, from their published configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        norm: "rms" or "layer".
        softcap: soft-capping of the logits; 0 for none.
        offset: added to the norms' weights, 1 for Gemma.
        attention_bias: whether q, k and v have a bias.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    activation: str = "silu"
    norm: str = "rms"
    softcap: float = 0.0
    offset: float = 0.0
    attention_bias: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256),
        Shape("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 152064, attention_bias=True),
        Shape("Gemma-2-9B", 3584, 14336, 16, 8, 256, 256000, activation="gelu_tanh", softcap=30.0, offset=1.0),
        Shape("Qwen3-0.6B", 1024, 3072, 16, 8, 128, 151936),
        Shape("BERT-large", 1024, 4096, 16, 16, 64, 30522, activation="gelu", norm="layer"),
    )
}
