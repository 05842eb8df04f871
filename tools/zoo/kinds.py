"""Which architectures there are: every causal language model of transformers, everything that sees or hears and answers
in words, and some of each other kind."""

from __future__ import annotations

from typing import NamedTuple

LANGUAGE = "AutoModelForCausalLM"
WHOLE = {
    LANGUAGE: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
"""Where transformers lists the types that a class makes models of, of classes whose types are all here."""
AGAIN = {"AutoModelForMultimodalLM": ("AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq")}
"""Classes that have the types of others among theirs, and make the same models of them."""
SOME = {
    "AutoModelForMaskedLM": (
        *("albert", "bert", "deberta-v2", "distilbert", "electra", "longformer", "modernbert", "roberta"),
    ),
    "AutoModelForSeq2SeqLM": ("bart", "m2m_100", "mbart", "pegasus", "t5", "umt5"),
    "AutoModelForImageClassification": (
        *("beit", "clip", "convnext", "convnextv2", "data2vec-vision", "dinov2", "dinov2_with_registers"),
        *("donut-swin", "focalnet", "hiera", "ijepa", "metaclip_2", "mobilevit", "pvt", "pvt_v2", "segformer"),
        *("siglip", "siglip2", "swiftformer", "swin", "swinv2", "vit", "vit_msn"),
    ),
    "AutoModelForSequenceClassification": (
        *("bert", "canine", "convbert", "deberta", "deberta-v2", "distilbert", "esm", "eurobert", "fnet", "funnel"),
        *("gpt2", "ibert", "layoutlm", "llama", "modernbert", "mpnet", "mra"),
        *("nomic_bert", "nystromformer", "qwen3", "roberta", "squeezebert", "xlnet", "yoso"),
    ),
}
"""Of images without networks that only convolve."""
READERS = (LANGUAGE, "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification")
"""Classes of models that are trained on words alone."""


class Kind(NamedTuple):
    """An architecture: its `model_type` in transformers, and the auto class that makes the model that is trained."""

    model_type: str
    auto_class: str = LANGUAGE

    @property
    def reads_only(self) -> bool:
        """Whether it is given words alone, even if it could see or hear."""
        return self.auto_class in READERS

    @property
    def classifies(self) -> bool:
        return self.auto_class.endswith("Classification")

    def __str__(self) -> str:
        return self.model_type if self.auto_class == LANGUAGE else f"{self.model_type}:{self.auto_class}"


def kinds() -> dict[str, Kind]:
    """All of them by name. A type that is a causal language model and something else too has the class in its name."""
    from transformers.models.auto import modeling_auto

    types = {auto_class: list(getattr(modeling_auto, mapping)) for auto_class, mapping in WHOLE.items()}
    for auto_class, others in AGAIN.items():
        known = {model_type for other in others for model_type in types[other]}
        types[auto_class] = [model_type for model_type in types[auto_class] if model_type not in known]
    found = [Kind(model_type, auto_class) for auto_class, named in types.items() for model_type in sorted(named)]
    found += [Kind(model_type, auto_class) for auto_class, named in SOME.items() for model_type in named]
    return {str(kind): kind for kind in found}
