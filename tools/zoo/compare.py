"""One training step of a tiny model, eager and compiled, in the current process.

The model has random weights and is trained in one of the ways of `ways.py`. Losses and gradients that differ from
eager's by more than float32 rounding are compared with a float64 step: they count as equal if eager's are as far from
it, in the first batch or in the median over several. In lower precisions the reference is a float32 step.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fastlora.tools.errors import one_line
from fastlora.tools.zoo.architectures import Architecture
from fastlora.tools.zoo.batches import cast_floats, make_batch
from fastlora.tools.zoo.quantize import dequantize_layers
from fastlora.tools.zoo.tiny_config import tiny_config
from fastlora.tools.zoo.ways import PLAIN, Way, linear_layers

BATCHES = 8
TOLERANCE = 1e-5
"""Relative differences up to this are rounding."""
RATIO = 1.25
"""Larger differences are rounding if the compiled error is at most this many times eager's error."""
LOSS_RATIO = 3.5
"""The same for the root mean square of the loss's error over `BATCHES` batches. It is larger because a loss is a single
number: for equally distributed errors the ratio exceeds 3.5 in one of a thousand cases (the 0.999 quantile of the F
distribution is 12)."""
_EPS = float(torch.finfo(torch.float32).eps)

LOSS_SCALE = 1024.0
"""Under float16 autocast, where small gradients would underflow."""

_LIBRARIES = ("torch", "transformers", "peft")
_LOSS = "the loss"
EQUAL, DIFFERENT, FAILED, UNTRAINED, UNBUILT = "equal", "different", "failed", "eager fails", "not built"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)


@dataclass
class Result:
    """The result for one architecture, trained in one way.

    Attributes:
        verdict: `equal` or `different` loss and gradients, compiled and eager; `failed` if compiling or the compiled
            step raised, `eager fails` if the eager step raised, `not built` if there is no tiny model of the type.
        problem: the exception, or the tensor that differs most.
        graphs, breaks: number of graphs and of graph breaks.
        sites: per op family, the numbers of candidates and of those that were fused.
        missed: how many candidates were not fused, by op family and reason.
        notes: notes of the report, for example on blocks that ran uncompiled.
        loss_difference, gradient_difference: relative to eager; of all gradients, the largest difference.
        versions: versions of the libraries.
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
    """The loss of a training step, and its gradients by parameter name."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def compare(architecture: Architecture, way: Way = PLAIN) -> dict[str, Any]:
    """Train a tiny model eagerly and compiled, and return the fields of a `Result`; exceptions become its problem."""
    result = Result(str(architecture), way.name)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _compare(architecture, way, result)
    except Exception as problem:  # libraries raise anything
        result.problem = f"{type(problem).__name__}: {one_line(problem)}"
    result.seconds = round(time.perf_counter() - started, 1)
    return asdict(result)


def _compare(architecture: Architecture, way: Way, result: Result) -> None:
    import fastlora

    model = build(architecture, way)
    result.verdict = UNTRAINED
    inputs = way.inputs(make_batch(model, architecture))
    reference_model = copy.deepcopy(model)
    eager = _step(model, inputs, way.autocast)
    result.verdict = FAILED
    fastlora.compile(model)
    if way.before_step is not None:
        way.before_step(model, inputs)
    compiled = _step(model, inputs, way.autocast)
    _add_report(result, fastlora.report(model))
    if way.is_low_precision:
        _compare_low_precision(result, model, way, architecture, reference_model)
    else:
        different = _compare_float32(result, compiled, eager, reference_model, inputs)
        if different:
            _compare_batches(result, different, model, way, architecture, reference_model)


def build(architecture: Architecture, way: Way = PLAIN) -> nn.Module:
    """Return the tiny model, adapted. Parameters that are initialized to zero, such as LoRA's B and some gates, are
    random instead, so that no gradient is zero."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(architecture.model_type)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if getattr(config, "pad_token_id", None) is None and (architecture.is_classifier or config.is_encoder_decoder):
        config.pad_token_id = 0
    base = getattr(transformers, architecture.auto_class).from_config(config).to(way.dtype)
    for name, parameter in base.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    model: Any = way.adapt(base, linear_layers(base))
    if way.initialize is not None:
        way.initialize(model, cast_floats(model, way.inputs(make_batch(model, architecture))))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name and not way.keeps_initialization:
            nn.init.normal_(parameter, std=0.1)
    if way.use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": way.use_reentrant})
        model.enable_input_require_grads()
    return model.train(way.training)


def _step(model: nn.Module, inputs: dict[str, torch.Tensor], autocast: torch.dtype | None = None) -> _Step:
    from transformers import set_seed

    model.zero_grad()
    set_seed(0)  # NumPy's generator too: audio models draw masks from it
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**cast_floats(model, inputs)).loss
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE, enabled=autocast is torch.float16)
    scaler.scale(loss).backward()
    scale = scaler.get_scale()
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    finite = all(bool(g.isfinite().all()) for g in (loss, *gradients.values()))
    if not finite or not gradients:
        raise ArithmeticError(
            f"the loss is {loss.item()}, {len(gradients)} gradients are {'' if finite else 'not '}finite"
        )
    return _Step(loss.detach(), gradients)


def _add_report(result: Result, report: Any) -> None:
    result.graphs, result.breaks = report.graphs, len(report.breaks)
    result.sites = {family: [c.seen, c.fused] for family, c in sorted(report.coverage.items()) if c.seen}
    missed: Counter[str] = Counter()
    for miss in report.missed:
        missed[f"{miss.op}: {miss.reason}"] += miss.count
    result.missed, result.notes = dict(missed), list(report.notes)


def _compare_float32(
    result: Result, compiled: _Step, eager: _Step, reference_model: nn.Module, inputs: dict[str, torch.Tensor]
) -> list[str]:
    """Compare one batch, and return the names of the tensors that are further from a float64 step than eager's."""
    result.verdict = DIFFERENT  # also if the float64 step raises
    if compiled.gradients.keys() != eager.gradients.keys():
        names = sorted(compiled.gradients.keys() ^ eager.gradients.keys())
        result.problem = f"{len(names)} gradients are missing or new, such as that of {names[0]}"
        return []
    scale = _largest_norm(eager)
    distances = {name: _distance(compiled.gradients[name], g, scale) for name, g in eager.gradients.items()}
    result.loss_difference = float((compiled.loss - eager.loss).abs() / eager.loss.abs().clamp_min(1e-30))
    result.gradient_difference = distances[max(distances, key=distances.__getitem__)]
    far = [name for name, distance in distances.items() if not distance <= TOLERANCE]  # includes nan
    if not far and result.loss_difference <= TOLERANCE:
        result.verdict = EQUAL
        return []
    reference = _step(_in_float64(reference_model), inputs)
    return _judge(result, [*far, _LOSS], [(compiled, eager, reference)])


def _compare_batches(
    result: Result, names: list[str], model: nn.Module, way: Way, architecture: Architecture, reference_model: nn.Module
) -> None:
    """Compare these tensors in the median over several batches. In one batch, which of two roundings has the smaller
    error is chance; a wrong gradient is wrong in all batches. The reference model is in float64."""
    batches, compiled, eager = _both_steps(model, way, architecture)
    reference = [_step(reference_model, inputs) for inputs in batches]
    _judge(result, names, list(zip(compiled, eager, reference, strict=True)))


def _both_steps(
    model: nn.Module, way: Way, architecture: Architecture
) -> tuple[list[dict[str, torch.Tensor]], list[_Step], list[_Step]]:
    """Return `BATCHES` batches with their compiled and their eager steps. Disables fastlora on the model."""
    import fastlora

    batches = [way.inputs(make_batch(model, architecture, seed)) for seed in range(BATCHES)]
    compiled = [_step(model, inputs, way.autocast) for inputs in batches]
    fastlora.disable(model)
    return batches, compiled, [_step(model, inputs, way.autocast) for inputs in batches]


def _judge(result: Result, names: list[str], steps: list[tuple[_Step, _Step, _Step]]) -> list[str]:
    """Set the verdict, and return the tensors whose compiled error exceeds the bound; errors are medians over triples
    of the compiled, the eager and the reference step."""
    different = []
    for name in names:
        errors = [(_error(compiled, ref, name), _error(eager, ref, name)) for compiled, eager, ref in steps]
        compiled_error, eager_error = (statistics.median(each) for each in zip(*errors, strict=True))
        if not compiled_error <= RATIO * eager_error + TOLERANCE:
            different.append(name)
    result.verdict = DIFFERENT if different else EQUAL
    result.problem = f"{different[0]}, and {len(different) - 1} more" if different else None
    return different


def _error(step: _Step, reference: _Step, name: str) -> float:
    if name == _LOSS:
        return float((step.loss.double() - reference.loss).abs())
    return _distance(step.gradients[name], reference.gradients[name], _largest_norm(reference))


def _largest_norm(step: _Step) -> float:
    return max(float(gradient.norm()) for gradient in step.gradients.values())


def _in_float64(model: nn.Module) -> nn.Module:
    """Convert a model to float64. Grouped products of experts and quantized layers do not support it, and are replaced
    by a loop over experts and by linear layers."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if getattr(getattr(base, "config", None), "_experts_implementation", None) == "grouped_mm":
        base.set_experts_implementation("eager")
    return dequantize_layers(model).double()


def _compare_low_precision(
    result: Result, model: nn.Module, way: Way, architecture: Architecture, reference_model: nn.Module
) -> None:
    """Compare the error of all gradients together, and of the loss, with eager's over several batches; the reference
    is a float32 step."""
    result.verdict = DIFFERENT
    batches, compiled, eager = _both_steps(model, way, architecture)
    reference = [_step(reference_model.float(), inputs) for inputs in batches]
    if not compiled[0].gradients.keys() == eager[0].gradients.keys() == reference[0].gradients.keys():
        result.problem = "gradients are missing or new"
        return
    errors, losses = [], []
    for steps in (compiled, eager):
        errors.append([_gradient_error(step, ref) for step, ref in zip(steps, reference, strict=True)])
        losses.append([float((s.loss.float() - ref.loss).abs()) for s, ref in zip(steps, reference, strict=True)])
    result.gradient_difference = statistics.median(errors[0])
    result.loss_difference = statistics.median(losses[0])
    ratio = statistics.median(a / b for a, b in zip(*errors, strict=True))
    squares = [statistics.mean(loss * loss for loss in each) for each in losses]
    if not ratio <= RATIO:
        result.problem = f"gradients are {ratio:.2f} times as far from float32's as eager's are"
    elif not squares[0] <= LOSS_RATIO**2 * squares[1]:
        result.problem = f"losses are {squares[0] ** 0.5:.1e} from float32's, eager's {squares[1] ** 0.5:.1e}"
    else:
        result.verdict = EQUAL


def _gradient_error(step: _Step, reference: _Step) -> float:
    """Return the relative error of all gradients as one vector."""
    squares = sum(float((g.float() - reference.gradients[name]).square().sum()) for name, g in step.gradients.items())
    return float((squares / sum(float(g.square().sum()) for g in reference.gradients.values())) ** 0.5)


def _distance(value: torch.Tensor, other: torch.Tensor, scale: float) -> float:
    """Return the distance relative to the other's norm.

    The norm is bounded below so that `TOLERANCE` is at least one rounding error of the largest gradient, whose norm is
    `scale`: a gradient that is zero in exact arithmetic, such as that of a key's bias, consists of rounding errors.
    """
    norm = max(float(other.double().norm()), _EPS / TOLERANCE * scale)
    return float((value.double() - other.double()).norm()) / norm if norm else 0.0
