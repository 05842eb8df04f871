"""Which architectures there are: every causal language model of transformers, and some of each other kind."""

from __future__ import annotations

from typing import NamedTuple

OTHERS = {
    "AutoModelForMaskedLM": ("albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"),
    "AutoModelForSeq2SeqLM": ("bart", "m2m_100", "mbart", "pegasus", "t5", "umt5"),
}


class Kind(NamedTuple):
    """An architecture: its `model_type` in transformers, and the auto class that makes the model that is trained."""

    model_type: str
    auto_class: str = "AutoModelForCausalLM"

    def __str__(self) -> str:
        return self.model_type if self.auto_class == "AutoModelForCausalLM" else f"{self.model_type}:{self.auto_class}"


def kinds() -> dict[str, Kind]:
    """All of them by name. A type that is a causal language model and something else too has the class in its name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = [Kind(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    found += [Kind(model_type, auto_class) for auto_class, types in OTHERS.items() for model_type in types]
    return {str(kind): kind for kind in found}
