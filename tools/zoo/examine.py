"""One training step of a tiny model, eager and compiled, in the process that this is called in.

The model has random float32 weights, and adapters on all its linear layers but the output head; it is in evaluation
mode, in which nothing is left to chance. What differs by more than rounding does is compared with a float64 step as
well: where eager is as far from that, it is rounding.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastlora.tools.problems import one_line
from fastlora.tools.zoo.kinds import Kind
from fastlora.tools.zoo.shrink import VOCABULARY, shrunk

ROWS, LENGTH, RANK = 2, 16, 4
FLOAT32 = 1e-5
"""Relative differences that are rounding in any case."""
SLACK = 1.25
"""Otherwise, how many times eager's distance from float64 may be the compiled step's."""

LINEAR = ("Linear", "Conv1D")
"""How classes of linear layers are called; others that derive from one are routers, which return more than a tensor."""
MAMBA_OWN = ("out_proj", "conv1d")
"""Layers of Mamba models that their kernels take apart, which PEFT refuses to adapt."""

EQUAL, DIFFERENT, FAILED, UNTRAINED, UNBUILT = "equal", "different", "failed", "eager fails", "not built"


@dataclass
class Examined:
    """What came of one architecture.

    Attributes:
        verdict: `equal` or `different` losses and gradients, compiled and eager; `failed` if compiling or the compiled
            step raised, `eager fails` if eager did, `not built` if there is no tiny model of it.
        problem: the exception, or the tensor that differs most.
        graphs, breaks: how many graphs there are, and what TorchDynamo broke them for.
        sites: by op family, how many candidates there are, and how many were fused.
        missed: reasons for which candidates were left, and how often.
        notes: what else the report says, such as why a block ran as it was.
        loss_difference, gradient_difference: relative to eager's; of gradients the largest.
    """

    name: str
    verdict: str = UNBUILT
    problem: str | None = None
    graphs: int = 0
    breaks: int = 0
    sites: dict[str, list[int]] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loss_difference: float | None = None
    gradient_difference: float | None = None
    seconds: float = 0.0


@dataclass
class _Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def examine(kind: Kind) -> dict[str, Any]:
    """Builds, trains and compiles one architecture; never raises."""
    found = Examined(str(kind))
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(kind, found)
    except Exception as problem:  # whatever a library raises is the finding
        found.problem = f"{type(problem).__name__}: {one_line(problem)}"
    found.seconds = round(time.perf_counter() - started, 1)
    return asdict(found)


def _examine(kind: Kind, found: Examined) -> None:
    import fastlora

    model = build(kind)
    found.verdict = UNTRAINED
    inputs = batch(kind)
    truth = copy.deepcopy(model)
    eager = _step(model, inputs)
    found.verdict = FAILED
    fastlora.compile(model)
    compiled = _step(model, inputs)
    _describe(found, fastlora.report(model))
    _compare(found, compiled, eager, truth, inputs)


def build(kind: Kind) -> nn.Module:
    """The tiny model with adapters; B is not zero, so that every gradient is something."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = shrunk(kind.model_type)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    base = getattr(transformers, kind.auto_class).from_config(config).float()
    head = base.get_output_embeddings()
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, linear) and type(module).__name__.endswith(LINEAR) and module is not head
    ]
    if any("mamba" in type(module).__name__.lower() for module in base.modules()):
        names = [name for name in names if not name.endswith(MAMBA_OWN)]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(kind: Kind) -> dict[str, torch.Tensor]:
    """Two sequences of random tokens that predict themselves."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY - 1, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> _Step:
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if not loss.isfinite() or not gradients:
        raise ArithmeticError(f"the loss is {loss.item()}, and {len(gradients)} parameters have a gradient")
    return _Step(loss.detach(), gradients)


def _describe(found: Examined, report: Any) -> None:
    found.graphs, found.breaks = report.graphs, len(report.breaks)
    found.sites = {family: [c.seen, c.fused] for family, c in sorted(report.coverage.items()) if c.seen}
    missed: Counter[str] = Counter()
    for miss in report.missed:
        missed[f"{miss.op}: {miss.reason}"] += miss.count
    found.missed, found.notes = dict(missed), list(report.notes)


def _compare(found: Examined, compiled: _Step, eager: _Step, truth: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    found.verdict = DIFFERENT  # until it is known to be rounding: there may be no float64 step to tell
    if compiled.gradients.keys() != eager.gradients.keys():
        odd = sorted(compiled.gradients.keys() ^ eager.gradients.keys())
        found.problem = f"{len(odd)} gradients are missing or new, such as that of {odd[0]}"
        return
    scale = max(float(g.norm()) for g in eager.gradients.values())
    distances = {name: _distance(compiled.gradients[name], g, scale) for name, g in eager.gradients.items()}
    worst = max(distances, key=distances.__getitem__)
    found.loss_difference = float((compiled.loss - eager.loss).abs() / eager.loss.abs().clamp_min(1e-30))
    found.gradient_difference = distances[worst]
    far = [name for name, distance in distances.items() if not distance <= FLOAT32]  # nan is far
    if not far and found.loss_difference <= FLOAT32:
        found.verdict = EQUAL
        return
    exact = _step(truth.double(), inputs)
    errors = {n: [_distance(s.gradients[n], exact.gradients[n], scale) for s in (compiled, eager)] for n in far}
    errors["the loss"] = [float((s.loss.double() - exact.loss).abs()) for s in (compiled, eager)]
    wrong = [n for n, (mine, its) in errors.items() if not mine <= SLACK * its + FLOAT32]
    if wrong:
        found.problem = f"{wrong[0]}, and {len(wrong) - 1} more"
    else:
        found.verdict = EQUAL


def _distance(value: torch.Tensor, other: torch.Tensor, scale: float) -> float:
    """Relative to the other's norm, or where that is next to nothing to a millionth of the largest gradient's."""
    norm = max(float(other.double().norm()), 1e-6 * scale)
    return float((value.double() - other.double()).norm()) / norm if norm else 0.0
