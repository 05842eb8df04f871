"""Performance targets of the kernels on an H200 in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastlora.tools.bench.contenders import BARE_PRODUCT

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A bound on a measure of one op for one pass, model, place (None: all places) and number of tokens."""

    op: str
    direction: str
    measure: str
    bound: float
    model: str = "Llama-3.1-8B"
    place: str | None = None
    tokens: int = 8192

    def applies_to(self, row: Row) -> bool:
        """Return whether this is the target of a row of `results.with_ratios`."""
        same = all(row[name] == getattr(self, name) for name in ("op", "direction", "model", "tokens"))
        return same and self.place in (None, row["place"]) and MEASURES[self.measure].read(row) is not None

    def is_met(self, row: Row) -> bool:
        measure = MEASURES[self.measure]
        found = measure.read(row)
        return found >= self.bound if measure.more_is_better else found <= self.bound


@dataclass(frozen=True)
class Measure:
    """How to read a measure from a row, and how to format it."""

    read: Callable[[Row], Any]
    form: str
    more_is_better: bool = False


MEASURES = {
    "time / bare product": Measure(lambda row: row["ratios"].get(BARE_PRODUCT), "{:.2f}"),
    "share of the limit": Measure(lambda row: row["share_of_limit"], "{:.0%}", more_is_better=True),
    "milliseconds": Measure(lambda row: row["device_us"] / 1e3, "{:.2f}"),
    "extra MiB": Measure(lambda row: row["extra_mib"], "{:.0f}"),
}

_BOTH = ("forward", "backward")

TARGETS = [
    *(
        Target(op, direction, "time / bare product", bound)
        for op in ("lora_linear", "lora_group", "lora_mlp")
        for direction, bound in zip(_BOTH, (1.08, 1.12), strict=True)
    ),
    *(
        Target(op, direction, "share of the limit", 0.85)
        for op in ("rms_norm", "add_rms_norm", "rotary_group", "glu")
        for direction in _BOTH
    ),
    *(
        Target(op, direction, "share of the limit", 0.85, model="BERT-large")
        for op in ("layer_norm", "add_layer_norm")
        for direction in _BOTH
    ),
    Target("linear_cross_entropy", "both", "milliseconds", 27.0, place="frozen head"),
    Target("linear_cross_entropy", "both", "extra MiB", 1024, place="frozen head"),
    Target("linear_cross_entropy", "both", "milliseconds", 36.0, place="trained head"),
    Target("linear_cross_entropy", "both", "extra MiB", 1536, place="trained head"),
    Target("dequantize_4bit", "forward", "share of the limit", 0.85, place="14336 x 4096"),
]
