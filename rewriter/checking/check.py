"""Checking a compiled training step against eager PyTorch, on demand or in the first step of a training run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastlora.checking.agreement import (
    LISTED,
    STEPS,
    Agreement,
    Compared,
    Losses,
    Rounding,
    Steps,
    compare,
    float64_mismatch,
    rounding_of,
)
from fastlora.checking.preserve_state import preserve_state
from fastlora.checking.trial import (
    LossOf,
    NoLossError,
    NotExactError,
    Slots,
    Step,
    Trial,
    bytes_in_float64,
    put_slots,
    slots_of,
)
from fastlora.compat.autograd import NO_BACKWARD, graph_task_id
from fastlora.errors import FastLoRAError
from fastlora.frontend.arguments import require_keywords
from fastlora.frontend.collect import collect
from fastlora.frontend.install import install
from fastlora.frontend.options import Options
from fastlora.frontend.session import Session
from fastlora.match.rule import AnyRule

_CALLS = 3
"""Number of calls without a loss after which `FirstStep` gives up."""


def check(
    model: nn.Module,
    *args: Any,
    defer_logits: bool = True,
    rules: Sequence[AnyRule] | None = None,
    tolerance: float | None = None,
    loss_fn: LossOf | None = None,
    **batch: Any,
) -> Agreement:
    """Run one training step compiled, eager and, if possible, in float64, and compare the loss and all gradients.

    The runs start from the same weights, batch and random state. Parameters, gradients, buffers, training flags, hooks,
    random states and an earlier compilation of the model are restored afterwards, also if a run raises. Trained
    parameters that are all zeros, such as LoRA's B at the start, are replaced by small random numbers during the runs,
    so that every gradient is tested. On a GPU all dropout probabilities are 0 during the runs.

    Args:
        model: as for `compile`, compiled or not, in training or evaluation mode.
        defer_logits: as for `compile`.
        rules: as for `compile`.
        tolerance: the relative error that rounding always explains. None for 1e-10 in float64, 1e-5 in float32, and
            the spacing of numbers next to 1 in 16 bits and TF32.
        loss_fn: computes the loss, a tensor of one element, from the output of the model. None for `output.loss`,
            `output["loss"]`, or the output itself.
        **batch: the arguments of the model's forward, with `labels` for a transformers model.

    Returns:
        An `Agreement`, which is true if the compiled step is right. Print it to see what was compared.

    Raises:
        FastLoRAError: if an argument is invalid, if there is no loss, if no trained parameter gets a gradient, or if
            the model is wrapped for data parallelism, is sharded, or has no weights yet.
    """
    require_keywords(args, "check")
    _check_options(tolerance, loss_fn)
    trial = Trial(model, (), batch, loss_fn)
    session = Session(Options(mode="no-cudagraphs", defer_logits=defer_logits), rules)
    with preserve_state(model):
        put_slots(model, {})
        install(model, session)
        slots = slots_of(model)
    try:
        return agree(trial, slots, session, tolerance)
    finally:
        session.drop_cuda_graphs()


def _check_options(tolerance: object, loss_fn: object) -> None:
    is_number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and float(tolerance) > 0):  # type: ignore[arg-type]
        raise FastLoRAError(f"tolerance must be a positive number, such as 1e-3, or None; got {tolerance!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise FastLoRAError(
            "loss_fn must be a function that returns the loss for an output of the model, or None to take output.loss; "
            f"got {loss_fn!r}"
        )


def agree(trial: Trial, slots: Slots, session: Session, tolerance: float | None = None) -> Agreement:
    """Compare the step of a trial with and without fastlora's gates in the compiled-call slots.

    Args:
        trial: the step.
        slots: the gates of the compiled model.
        session: the session that they belong to.
        tolerance: as for `check`.

    Raises:
        FastLoRAError: if no trained parameter gets a gradient.
    """
    eager = trial.step({})
    compiled = trial.step(slots)
    exact, skipped = _exact(trial, eager)
    runs, rounding = [Steps(compiled, eager, exact)], _rounding(trial, tolerance)
    found = compare(runs, rounding)
    if not (eager.gradients or compiled.gradients):
        raise FastLoRAError("no trained parameter gets a gradient, so there is nothing to compare")
    wrong = [each.name for each in found if not each.right]
    if wrong and exact is not None:  # a single step may exceed its bound by chance
        runs += [_perturbed_steps(trial, slots, seed) for seed in range(1, STEPS)]
        found = [each for each in found if each.right] + compare(runs, rounding, wrong)
    found.sort(key=lambda each: each.excess, reverse=True)
    return Agreement(
        Losses(float(compiled.loss), float(eager.loss), None if exact is None else float(exact.loss)),
        compared=len(found) - 1,
        wrong=sum(not each.right for each in found),
        worst=found[:LISTED],
        missing=sorted(eager.gradients.keys() - compiled.gradients.keys()),
        extra=sorted(compiled.gradients.keys() - eager.gradients.keys()),
        fused=sum(site.count for site in collect(session).fused),
        skipped=skipped,
        notes=[*trial.notes, *_remarks(trial, session, runs[0], found)],
    )


class FirstStep:
    """Checks a compiled model on its first training step, and returns it to eager mode if the step is wrong.

    Call it before each call of the model; it returns whether to run the model compiled. The check itself calls the
    model, which then runs compiled. If the check raises, such as for lack of memory, the model stays compiled, with a
    warning. If the step is right, the report of the model has a note.

    Attributes:
        agreement: the result of the check, None before.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        self.agreement: Agreement | None = None
        self._model, self._session = model, session
        self._calls_left = _CALLS

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether to run the model compiled. The arguments are not changed."""
        is_training = torch.is_grad_enabled() and graph_task_id() == NO_BACKWARD
        if not self._calls_left or not is_training or torch.compiler.is_compiling():
            return True
        calls_left, self._calls_left = self._calls_left - 1, 0
        try:
            self.agreement = self._check(args, kwargs)
        except NoLossError as problem:
            self._calls_left = calls_left
            if not calls_left:
                _warn(f"no step was checked: {problem}. Or use fastlora.check(model, loss_fn=..., **batch)")
            return True
        except Exception as problem:  # if the step itself raises it, the user sees it next
            _warn(f"the first step could not be checked: {_in_one_line(problem)}")
            return True
        if self.agreement:
            self._session.notes.append(f"the first step was checked. {self.agreement}".partition("\n")[0])
            return True
        put_slots(self._model, {})
        self._session.drop_cuda_graphs()
        _warn(f"the first compiled step is wrong, so the model continues in eager mode.\n{self.agreement}")
        return False

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Agreement:
        counts = SimpleNamespace(bypassed=self._session.bypassed)
        trial = Trial(self._model, args, kwargs, others=(self._session.deferral_stats, counts))
        return agree(trial, slots_of(self._model), self._session)


def _warn(text: str) -> None:
    warnings.warn(f"verify='first-step': {text}", stacklevel=2)


def _in_one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".partition("\n")[0]


def _perturbed_steps(trial: Trial, slots: Slots, seed: int) -> Steps:
    compiled, eager = (trial.step(each, seed=seed) for each in (slots, {}))
    return Steps(compiled, eager, trial.step({}, exact=True, seed=seed))


def _rounding(trial: Trial, tolerance: float | None) -> Rounding:
    on_gpu = any(p.is_cuda for p in trial.model.parameters())
    found = rounding_of(trial.dtypes, on_gpu and torch.get_float32_matmul_precision() != "highest")
    return found if tolerance is None else found._replace(floor=tolerance)


def _exact(trial: Trial, eager: Step) -> tuple[Step | None, list[str]]:
    """Run the step in float64; return it, or None and the reason why that is not possible."""
    reason = _memory_problem(trial.model)
    if reason is None:
        try:
            exact = trial.step({}, exact=True)
            reason = float64_mismatch(eager, exact)
            if reason is None:
                return exact, []
        except NotExactError as problem:
            reason = str(problem)
        except Exception as problem:  # many kernels do not support float64
            reason = _in_one_line(problem)
    return None, [f"no step in float64 ({reason}); compared with eager alone, by a wider bound for the dtype"]


def _memory_problem(model: nn.Module) -> str | None:
    """Return why there is not enough memory for a step in float64, or None."""
    for kind, free in (("cpu", _free_on_host()), ("cuda", _free_on_gpu())):
        needed = 2 * bytes_in_float64(model, kind)  # twice, for activations
        if free is not None and needed > free:
            return f"it may need {needed >> 20:,} MiB, {free >> 20:,} MiB are free"
    return None


def _free_on_host() -> int | None:
    """Return the bytes that Linux reports as available, None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _free_on_gpu() -> int | None:
    """Return the free bytes of the current GPU, including those that PyTorch's allocator has reserved."""
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _remarks(trial: Trial, session: Session, steps: Steps, found: list[Compared]) -> list[str]:
    """Return notes on the limits of the comparison."""
    trained = {name for name, p in trial.model.named_parameters() if p.requires_grad}
    without_gradient = sorted(trained - steps.eager.gradients.keys() - steps.compiled.gradients.keys())
    too_small = sorted(each.name for each in found if each.bound >= 1)
    remarks = []
    if not session.graphs:
        remarks.append("nothing was compiled, so both steps ran eagerly")
    if not steps.eager.loss.isfinite():
        remarks.append("the loss is not finite in eager PyTorch; only what is finite was compared")
    if without_gradient:
        count, example = len(without_gradient), without_gradient[0]
        remarks.append(f"{count} trained parameters got no gradient in either step, such as {example}")
    if too_small:
        count, example = len(too_small), too_small[0]
        remarks.append(f"{count} gradients are too small, next to the largest, to be judged, such as {example}")
    return remarks + [f"{count} calls ran uncompiled: {reason}" for reason, count in session.bypassed.items()]
