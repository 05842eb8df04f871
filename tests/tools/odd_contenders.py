"""Contenders that go wrong, each in its own way, for the benchmark of a step to notice."""

from __future__ import annotations

import os
from typing import Any

from fastlora.tools.bench.step.preparations import Place, Prepared, eager


def one_gradient_halved(place: Place) -> Prepared:
    prepared = eager(place)
    name, parameter = next(item for item in prepared.model.named_parameters() if item[1].requires_grad)
    assert name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight")
    parameter.register_hook(lambda gradient: gradient / 2)
    return prepared


def raising(place: Place) -> Prepared:
    raise RuntimeError("no kernel\n  for this shape")


def dying(place: Place) -> Any:
    print("last words", flush=True)
    os._exit(3)
