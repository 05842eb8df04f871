"""One training step of a tiny model, eager and compiled, in the process that this is called in.

The model has random weights and is trained in one of the ways of `ways.py`. What differs by more than rounding in
float32 does is compared with a float64 step as well: where eager is as far from that, in the median over some batches
if not in the first, it is rounding. Lower precisions are compared with a float32 step.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fastlora.tools.problems import one_line
from fastlora.tools.zoo.batches import batch, typed
from fastlora.tools.zoo.kinds import Kind
from fastlora.tools.zoo.quantised import decode
from fastlora.tools.zoo.shrink import shrunk
from fastlora.tools.zoo.ways import PLAIN, Way

BATCHES = 8
FLOAT32 = 1e-5
"""Relative differences that are rounding in any case."""
_EPS = float(torch.finfo(torch.float32).eps)
SLACK = 1.25
"""Otherwise, how many times eager's distance from float64 may be the compiled step's."""
LOSS_SLACK = 3.5
"""The same for the losses of `BATCHES` batches, a number each: of errors that are alike, the root mean squares of eight
differ as much in one of a thousand cases (the 0.999 quantile of the F distribution is 12)."""

SCALE = 1024.0
"""By which losses are scaled under float16 autocast, where small gradients would be nothing."""

LINEAR = re.compile(r"(?!.*Grouped).*(Linear|Conv1D)")
"""How classes of linear layers are called; others that derive from one are routers, which return more than a tensor.
Nor are grouped ones, whose weight PEFT takes for that of one layer."""
MAMBA_OWN = ("out_proj", "conv1d")
"""Layers of Mamba models that their kernels take apart, which PEFT refuses to adapt."""
MAMBA_TYPES = ("falcon_h1", "nemotron_h")
"""Types that PEFT counts among those models, whose classes do not say so."""

_LIBRARIES = ("torch", "transformers", "peft")
_LOSS = "the loss"
EQUAL, DIFFERENT, FAILED, UNTRAINED, UNBUILT = "equal", "different", "failed", "eager fails", "not built"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)


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
        versions: of the libraries it was seen with.
    """

    name: str
    way: str = PLAIN.name
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
    versions: str = field(default_factory=_versions)


@dataclass
class _Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def examine(kind: Kind, way: Way = PLAIN) -> dict[str, Any]:
    """Builds, trains and compiles one architecture; never raises."""
    found = Examined(str(kind), way.name)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(kind, way, found)
    except Exception as problem:  # whatever a library raises is the finding
        found.problem = f"{type(problem).__name__}: {one_line(problem)}"
    found.seconds = round(time.perf_counter() - started, 1)
    return asdict(found)


def _examine(kind: Kind, way: Way, found: Examined) -> None:
    import fastlora

    model = build(kind, way)
    found.verdict = UNTRAINED
    inputs = way.inputs(batch(model, kind))
    truth = copy.deepcopy(model)
    eager = _step(model, inputs, way.autocast)
    found.verdict = FAILED
    fastlora.compile(model)
    if way.between is not None:
        way.between(model, inputs)
    compiled = _step(model, inputs, way.autocast)
    _describe(found, fastlora.report(model))
    if way.rounds:
        _compare_rounded(found, model, way, kind, truth)
    else:
        wrong = _compare(found, compiled, eager, truth, inputs)
        if wrong:
            _compare_again(found, wrong, model, way, kind, truth)


def build(kind: Kind, way: Way = PLAIN) -> nn.Module:
    """The tiny model, as it is trained. No LoRA's B is zero, and no gate, so that every gradient is something."""
    import transformers

    torch.manual_seed(0)
    config = shrunk(kind.model_type)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if getattr(config, "pad_token_id", None) is None and (kind.classifies or config.is_encoder_decoder):
        config.pad_token_id = 0
    base = getattr(transformers, kind.auto_class).from_config(config).to(way.dtype)
    for name, parameter in base.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    model: Any = way.adapt(base, _linear_layers(base))
    if way.initialise is not None:
        way.initialise(model, typed(model, way.inputs(batch(model, kind))))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name and not way.initialised:
            nn.init.normal_(parameter, std=0.1)
    if way.reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": way.reentrant})
        model.enable_input_require_grads()
    return model.train(way.training)


def _linear_layers(base: Any) -> list[str]:
    """The names of those that LoRA goes on."""
    import transformers

    head = base.get_output_embeddings()
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, linear) and LINEAR.fullmatch(type(module).__name__) and module is not head
    ]
    classes = {type(module).__name__.lower() for module in base.modules()}
    if base.config.model_type in MAMBA_TYPES or any("mamba" in name for name in classes):
        names = [name for name in names if not name.endswith(MAMBA_OWN)]
    return names


def _step(model: nn.Module, inputs: dict[str, torch.Tensor], autocast: torch.dtype | None = None) -> _Step:
    from transformers import set_seed

    model.zero_grad()
    set_seed(0)  # of NumPy as well, which masks of sounds are drawn from
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**typed(model, inputs)).loss
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=autocast is torch.float16)
    scaler.scale(loss).backward()
    scale = scaler.get_scale()
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    finite = all(bool(g.isfinite().all()) for g in (loss, *gradients.values()))
    if not finite or not gradients:
        raise ArithmeticError(
            f"the loss is {loss.item()}, {len(gradients)} gradients are {'' if finite else 'not '}finite"
        )
    return _Step(loss.detach(), gradients)


def _describe(found: Examined, report: Any) -> None:
    found.graphs, found.breaks = report.graphs, len(report.breaks)
    found.sites = {family: [c.seen, c.fused] for family, c in sorted(report.coverage.items()) if c.seen}
    missed: Counter[str] = Counter()
    for miss in report.missed:
        missed[f"{miss.op}: {miss.reason}"] += miss.count
    found.missed, found.notes = dict(missed), list(report.notes)


def _compare(
    found: Examined, compiled: _Step, eager: _Step, truth: nn.Module, inputs: dict[str, torch.Tensor]
) -> list[str]:
    """The tensors that are further from a float64 step than eager's are, by more than rounding is in most cases."""
    found.verdict = DIFFERENT  # until it is known to be rounding: there may be no float64 step to tell
    if compiled.gradients.keys() != eager.gradients.keys():
        odd = sorted(compiled.gradients.keys() ^ eager.gradients.keys())
        found.problem = f"{len(odd)} gradients are missing or new, such as that of {odd[0]}"
        return []
    scale = max(float(g.norm()) for g in eager.gradients.values())
    distances = {name: _distance(compiled.gradients[name], g, scale) for name, g in eager.gradients.items()}
    worst = max(distances, key=distances.__getitem__)
    found.loss_difference = float((compiled.loss - eager.loss).abs() / eager.loss.abs().clamp_min(1e-30))
    found.gradient_difference = distances[worst]
    far = [name for name, distance in distances.items() if not distance <= FLOAT32]  # nan is far
    if not far and found.loss_difference <= FLOAT32:
        found.verdict = EQUAL
        return []
    exact = _step(_in_float64(truth), inputs)
    return _judge(found, [*far, _LOSS], [(compiled, eager, exact)])


def _compare_again(found: Examined, names: list[str], model: nn.Module, way: Way, kind: Kind, truth: nn.Module) -> None:
    """The same for these tensors in the median over some batches: which of two roundings is luckier in one is chance,
    but what is wrong is so in all."""
    import fastlora

    batches = [way.inputs(batch(model, kind, seed)) for seed in range(BATCHES)]
    mine = [_step(model, inputs) for inputs in batches]
    fastlora.disable(model)
    its = [_step(model, inputs) for inputs in batches]
    exact = [_step(truth, inputs) for inputs in batches]  # it is in float64 already
    _judge(found, names, list(zip(mine, its, exact, strict=True)))


def _judge(found: Examined, names: list[str], steps: list[tuple[_Step, _Step, _Step]]) -> list[str]:
    """Which of these are further from exact than eager's, in the median over triples of compiled, eager and exact."""
    wrong = []
    for name in names:
        errors = [(_off(mine, exact, name), _off(its, exact, name)) for mine, its, exact in steps]
        ours, eagers = (statistics.median(each) for each in zip(*errors, strict=True))
        if not ours <= SLACK * eagers + FLOAT32:
            wrong.append(name)
    found.verdict = DIFFERENT if wrong else EQUAL
    found.problem = f"{wrong[0]}, and {len(wrong) - 1} more" if wrong else None
    return wrong


def _off(step: _Step, exact: _Step, name: str) -> float:
    if name == _LOSS:
        return float((step.loss.double() - exact.loss).abs())
    scale = max(float(g.norm()) for g in exact.gradients.values())
    return _distance(step.gradients[name], exact.gradients[name], scale)


def _in_float64(model: nn.Module) -> nn.Module:
    """With experts one by one, as the product of all at once, which transformers prefers, has no such dtype; nor have
    quantised layers."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if getattr(getattr(base, "config", None), "_experts_implementation", None) == "grouped_mm":
        base.set_experts_implementation("eager")
    return decode(model).double()


def _compare_rounded(found: Examined, model: nn.Module, way: Way, kind: Kind, truth: nn.Module) -> None:
    """By the distances of all gradients together, and of losses, from float32 steps, in the median over some batches:
    which of two roundings is luckier in one is chance."""
    import fastlora

    found.verdict = DIFFERENT
    batches = [way.inputs(batch(model, kind, seed)) for seed in range(BATCHES)]
    mine = [_step(model, inputs, way.autocast) for inputs in batches]
    fastlora.disable(model)
    its = [_step(model, inputs, way.autocast) for inputs in batches]
    exact = [_step(truth.float(), inputs) for inputs in batches]
    if not mine[0].gradients.keys() == its[0].gradients.keys() == exact[0].gradients.keys():
        found.problem = "gradients are missing or new"
        return
    errors = [[_error(step, true) for step, true in zip(steps, exact, strict=True)] for steps in (mine, its)]
    losses = [
        [float((s.loss.float() - t.loss).abs()) for s, t in zip(steps, exact, strict=True)] for steps in (mine, its)
    ]
    found.gradient_difference = statistics.median(errors[0])
    found.loss_difference = statistics.median(losses[0])
    ratio = statistics.median(a / b for a, b in zip(*errors, strict=True))
    squares = [statistics.mean(loss * loss for loss in each) for each in losses]
    if not ratio <= SLACK:
        found.problem = f"gradients are {ratio:.2f} times as far from float32's as eager's are"
    elif not squares[0] <= LOSS_SLACK**2 * squares[1]:
        found.problem = f"losses are {squares[0] ** 0.5:.1e} from float32's, eager's {squares[1] ** 0.5:.1e}"
    else:
        found.verdict = EQUAL


def _error(step: _Step, exact: _Step) -> float:
    """The distance of all gradients together."""
    squares = sum(float((g.float() - exact.gradients[name]).square().sum()) for name, g in step.gradients.items())
    return float((squares / sum(float(g.square().sum()) for g in exact.gradients.values())) ** 0.5)


def _distance(value: torch.Tensor, other: torch.Tensor, scale: float) -> float:
    """Relative to the other's norm; but `FLOAT32` is no less than one rounding of the largest gradient, as where a
    gradient is nothing but what others leave when they cancel, that of a key's bias for one, it is their rounding."""
    norm = max(float(other.double().norm()), _EPS / FLOAT32 * scale)
    return float((value.double() - other.double()).norm()) / norm if norm else 0.0
