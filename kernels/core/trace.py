"""Records the operators and kernel launches of one call of an implementation, to replay them in similar calls.

An implementation decides from shapes, strides and dtypes what to allocate, which products to compute and which kernels
to launch. On the host, that takes several times as long as the resulting calls themselves, so for small layers the
device would wait. Therefore the calls are recorded, PyTorch operators by a dispatch mode and kernel launches by
`record_launch`, and generated as a Python function that does nothing else.

The function can be called with tensors of the same layouts, dtypes and devices, which the caller guards on, that are
aligned to 16 bytes. Recorded calls may only read inputs, registered constants and results of earlier calls; otherwise
there is no such function.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastlora.compat import calls
from fastlora.compat.dispatch import TorchDispatchMode, schema_of
from fastlora.kernels.core import dispatch

ALIGNMENT = 16
"""The alignment in bytes of tensors that kernels are specialized to."""
_PYTHON = {
    torch.ops.aten.empty.memory_format: torch.empty,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.t.default: torch.t,
    torch.ops.aten.view.default: torch.Tensor.view,
    torch.ops.aten.cat.default: torch.cat,
    torch.ops.aten.split_with_sizes.default: torch.split_with_sizes,
}
"""Functions that replace operators in replays, with the same arguments: they have less overhead."""
RECONSTRUCTORS: dict[type, Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...]]]] = {}
"""How generated code reconstructs a value of a type: returns a function and its arguments."""


class Untraceable(Exception):
    """A call cannot be replayed."""


STREAM = object()
"""A placeholder for the device's current stream among the arguments of a launch."""


def _never() -> bool:
    return False


class Launch(NamedTuple):
    """How to repeat a kernel launch: by `function(*before, *args)`, unless `unfit()` returns True."""

    function: Callable[..., Any]
    before: tuple[Any, ...] = ()
    unfit: Callable[[], bool] = _never


class _Line(NamedTuple):
    """A line of generated code: the names that it assigns and reads, and whether it has no effect besides results."""

    results: tuple[str, ...]
    text: str
    reads: frozenset[str]
    is_pure: bool


class _Recorder(TorchDispatchMode):
    """Generates code for the calls that it observes."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self._can_replay = True
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._reads: set[str] = set()
        self._device = inputs[0].device
        self._unfit: dict[Callable[[], bool], None] = {}
        for i, t in enumerate(inputs):
            self._tensors.setdefault(id(t), (weakref.ref(t), f"i{i}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _thread.recorder = None  # the operator is replayed as a whole
        try:
            result = func(*args, **kwargs)
        finally:
            _thread.recorder = self
        with self._recording():
            self._operator(func, args, kwargs, result)
        return result

    def launch(self, launch: Launch | None, args: tuple[Any, ...]) -> None:
        """Record a kernel launch."""
        with self._recording():
            if launch is None:
                raise Untraceable("it launches a kernel for the first time")
            self._unfit[launch.unfit] = None
            before = [self.text(value) if value is not STREAM else "stream" for value in launch.before]
            self._add((), f"{self._constant(launch.function)}({', '.join([*before, *map(self.text, args)])})", False)

    def disable_replay(self) -> None:
        """Have `replay` return None."""
        self._can_replay = False

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Disable the replay if something in this context is untraceable."""
        try:
            yield
        except Untraceable:
            self._can_replay = False

    def _operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [*map(self.text, args), *(f"{name}={self.text(value)}" for name, value in kwargs.items())]
        text = f"{self._constant(_PYTHON.get(func, func._op))}({', '.join(given)})"
        several = isinstance(result, (list, tuple))
        results = list(result) if several else [result]
        if not all(isinstance(t, torch.Tensor) for t in results):
            if not self._reads:
                return  # an operator that takes no tensors, such as for type promotion
            raise Untraceable(f"{func} returns a value that is not a tensor")
        if any(t.device != self._device for t in results):
            raise Untraceable(f"{func} copies values to another device, where Python code may depend on them")
        is_known = any(self._name(t) is not None for t in results)
        if is_known or schema_of(func).is_mutable:
            self._add((), text, is_pure=False)
            return
        names = tuple(f"t{len(self.lines)}_{i}" for i in range(len(results)))
        self._add(names, text, is_pure=True, several=several)
        for name, t in zip(names, results, strict=True):
            self._tensors[id(t)] = weakref.ref(t), name

    def _add(self, results: tuple[str, ...], text: str, is_pure: bool, several: bool = False) -> None:
        left = f"{', '.join(results)}{',' * several} = " if results else ""
        self.lines.append(_Line(results, left + text, frozenset(self._reads), is_pure))
        self._reads.clear()

    def _name(self, t: torch.Tensor) -> str | None:
        ref, name = self._tensors.get(id(t), (None, None))
        return name if ref is not None and ref() is t else None

    def text(self, value: Any) -> str:
        """Return a Python expression for a value."""
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, torch.Tensor):
            name = self._name(value)
            if name is None and not dispatch.is_constant(value):
                raise Untraceable("it reads a tensor that is neither an input nor a constant")
            if name is None:
                return self._constant(value)
            self._reads.add(name)
            return name
        if type(value) in RECONSTRUCTORS:
            function, args = RECONSTRUCTORS[type(value)](value)
            return f"{self._constant(function)}({', '.join(map(self.text, args))})"
        if type(value) in (list, torch.Size):
            return f"[{', '.join(map(self.text, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self.text(each)}, ' for each in value)})"
        if type(value) is dict:
            return f"{{{', '.join(f'{key!r}: {self.text(each)}' for key, each in value.items())}}}"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def replay(self, inputs: int, result: Any) -> Callable[..., Any] | None:
        """Return a function that repeats the calls, or None if that is impossible."""
        with self._recording():
            returned = self.text(result)
        if not self._can_replay:
            return None
        names = [f"i{i}" for i in range(inputs)]
        addresses = " | ".join(f"{name}.data_ptr()" for name in names)
        unfit = [*(f"{self._constant(each)}()" for each in self._unfit), f"({addresses}) % {ALIGNMENT}"]
        body = [f"if {' or '.join(unfit)}:", "    return NotImplemented"]
        if self._device.type == "cuda":
            body.append(f"stream = current_stream({self._device.index})")
        body += [*self._needed_lines(), f"return {returned}"]
        scope = {**self.constants, "current_stream": calls.current_stream}
        exec("\n    ".join([f"def replay({', '.join(names)}):", *body]), scope)
        return scope["replay"]  # type: ignore[no-any-return]

    def _needed_lines(self) -> list[str]:
        """Return the lines that have effects or whose results are used; names are deleted after their last use."""
        reads = set(self._reads)
        lines: list[str] = []
        for line in reversed(self.lines):
            if line.is_pure and reads.isdisjoint(line.results):
                continue
            dead = sorted(name for name in line.reads - reads if name.startswith("t"))
            dead += [name for name in line.results if name not in reads]
            if dead:
                lines.append(f"del {', '.join(dead)}")
            lines.append(line.text)
            reads |= line.reads
        return lines[::-1]


def trace(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> tuple[Any, Callable[..., Any] | None]:
    """Run a function on tensors; return its result, and a function that replays its calls on tensors of equal layouts.

    The latter is None if the calls cannot be replayed. It returns NotImplemented for tensors that are not aligned to 16
    bytes, and if a launch is unfit. `function` must not depend on the values of its tensors, in particular not in ways
    that the dispatcher does not see, such as `tolist` and `numpy` on a CPU.
    """
    if any(t.data_ptr() % ALIGNMENT for t in tensors):
        return function(*tensors), None
    recorder = _Recorder(tensors)
    before, _thread.recorder = _thread.recorder, recorder
    try:
        with dispatch.ignoring_one_mode(), recorder:
            result = function(*tensors)
    finally:
        _thread.recorder = before
    return result, recorder.replay(len(tensors), result)


class _Thread(threading.local):
    recorder: _Recorder | None = None


_thread = _Thread()


def is_recording() -> bool:
    """Return whether this thread is recording."""
    return _thread.recorder is not None


def require_traceable(traceable: bool) -> None:
    """Disable the replay of this thread's recording, if any, unless the implementation that runs is traceable."""
    if _thread.recorder is not None and not traceable:
        _thread.recorder.disable_replay()


def record_launch(launch: Launch | None, args: tuple[Any, ...]) -> None:
    """Add a kernel launch to this thread's recording, if any.

    Args:
        launch: how to repeat it; None if that is not known.
        args: the kernel's arguments.
    """
    if _thread.recorder is not None:
        _thread.recorder.launch(launch, args)
