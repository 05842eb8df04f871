"""Faulty contenders: one with a wrong gradient, one that raises, one whose process dies."""

from __future__ import annotations

import os
from typing import Any

from fastlora.tools.bench.step.preparations import Prepared, Workspace, eager


def one_gradient_halved(workspace: Workspace) -> Prepared:
    prepared = eager(workspace)
    name, parameter = next(item for item in prepared.model.named_parameters() if item[1].requires_grad)
    assert name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight")
    parameter.register_hook(lambda gradient: gradient / 2)
    return prepared


def raising(workspace: Workspace) -> Prepared:
    raise RuntimeError("no kernel\n  for this shape")


def dying(workspace: Workspace) -> Any:
    print("last words", flush=True)
    os._exit(3)
