"""The architectures that `fastlora zoo` trains: every model type of some auto classes of transformers, and selected
model types of others."""

from __future__ import annotations

from typing import NamedTuple

CAUSAL_LM = "AutoModelForCausalLM"
COMPLETE = {
    CAUSAL_LM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
"""Auto classes of which every model type is included, with the name of their mapping in transformers."""
INCLUDES = {"AutoModelForMultimodalLM": ("AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq")}
"""Auto classes whose mapping repeats the model types of other auto classes, which are listed under those."""
SELECTED = {
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
"""Model types of the other auto classes. Image classifiers that consist of convolutions alone are left out."""
TEXT_ONLY = (CAUSAL_LM, "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification")
"""Auto classes whose models are trained on text alone, even if they accept images or audio."""


class Architecture(NamedTuple):
    """A `model_type` of transformers, and the auto class that builds the model."""

    model_type: str
    auto_class: str = CAUSAL_LM

    @property
    def is_text_only(self) -> bool:
        return self.auto_class in TEXT_ONLY

    @property
    def is_classifier(self) -> bool:
        return self.auto_class.endswith("Classification")

    def __str__(self) -> str:
        return self.model_type if self.auto_class == CAUSAL_LM else f"{self.model_type}:{self.auto_class}"


def architectures() -> dict[str, Architecture]:
    """Return all architectures by name: the model type, followed by the auto class unless it is a causal LM."""
    from transformers.models.auto import modeling_auto

    types = {auto_class: list(getattr(modeling_auto, mapping)) for auto_class, mapping in COMPLETE.items()}
    for auto_class, included in INCLUDES.items():
        known = {model_type for each in included for model_type in types[each]}
        types[auto_class] = [model_type for model_type in types[auto_class] if model_type not in known]
    found = [Architecture(name, auto_class) for auto_class, names in types.items() for name in sorted(names)]
    found += [Architecture(name, auto_class) for auto_class, names in SELECTED.items() for name in names]
    return {str(architecture): architecture for architecture in found}
