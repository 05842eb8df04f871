"""Records what an implementation does in one call as a straight line of calls, which others like it replay.

An implementation finds out from shapes, strides and dtypes what to allocate, which products to make and which kernels
to launch with what. That takes the host several times as long as the calls that come of it, and where layers are short,
or their activations on their way to the host, the device waits for it. So the calls are recorded, PyTorch's operators
as the dispatcher sees them and launches of kernels as `launched` is told, and written as a Python function with nothing
else in it.

It serves tensors of the same layouts, dtypes and devices, which the caller checks, that start at multiples of 16 bytes.
What the calls read has to be among the given tensors or come of earlier calls, or there is no such function.
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
"""Kernels are specialized to tensors that start at multiples of so many bytes."""
_PYTHON = {
    torch.ops.aten.empty.memory_format: torch.empty,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.t.default: torch.t,
    torch.ops.aten.view.default: torch.Tensor.view,
    torch.ops.aten.cat.default: torch.cat,
    torch.ops.aten.split_with_sizes.default: torch.split_with_sizes,
}
"""What is called in place of operators, with the same arguments: the way to them is shorter there."""
WRITERS: dict[type, Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...]]]] = {}
"""How to make a value of a type again: what it is written as, a function and its arguments."""


class Unknown(Exception):
    """A call cannot be written down."""


STREAM = object()
"""Stands for the device's current stream among what a launch takes."""


def _never() -> bool:
    return False


class Launch(NamedTuple):
    """How to launch a kernel again: `function(*before, *args)`, unless `unfit()` says that something forbids it."""

    function: Callable[..., Any]
    before: tuple[Any, ...] = ()
    unfit: Callable[[], bool] = _never


class _Line(NamedTuple):
    """A call: what it assigns, its text, the names that it reads, and whether it is only there for its results."""

    results: tuple[str, ...]
    text: str
    reads: frozenset[str]
    is_pure: bool


class _Recorder(TorchDispatchMode):
    """Writes calls down, and names what they take and give."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self._knows_all = True
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._reads: set[str] = set()
        self._device = inputs[0].device
        self._unfit: dict[Callable[[], bool], None] = {}
        for i, t in enumerate(inputs):
            self._tensors.setdefault(id(t), (weakref.ref(t), f"i{i}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _thread.recorder = None  # what the operator does within is its own business
        try:
            result = func(*args, **kwargs)
        finally:
            _thread.recorder = self
        with self._writing():
            self._operator(func, args, kwargs, result)
        return result

    def launch(self, launch: Launch | None, args: tuple[Any, ...]) -> None:
        """Note a launch of a kernel."""
        with self._writing():
            if launch is None:
                raise Unknown("it launches a kernel that was not launched before")
            self._unfit[launch.unfit] = None
            before = [self.text(value) if value is not STREAM else "stream" for value in launch.before]
            self._note((), f"{self._constant(launch.function)}({', '.join([*before, *map(self.text, args)])})", False)

    def give_up(self) -> None:
        """Go on, without a replay in the end."""
        self._knows_all = False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Go on where something cannot be written; there is no replay in the end."""
        try:
            yield
        except Unknown:
            self._knows_all = False

    def _operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [*map(self.text, args), *(f"{name}={self.text(value)}" for name, value in kwargs.items())]
        text = f"{self._constant(_PYTHON.get(func, func._op))}({', '.join(given)})"
        several = isinstance(result, (list, tuple))
        results = list(result) if several else [result]
        if not all(isinstance(t, torch.Tensor) for t in results):
            if not self._reads:
                return  # a question that has nothing to do with tensors, such as for dtypes
            raise Unknown(f"{func} gives what is no tensor")
        if any(t.device != self._device for t in results):
            raise Unknown(f"{func} takes values to another device, where Python may look at them")
        is_known = any(self._name(t) is not None for t in results)
        if is_known or schema_of(func).is_mutable:
            self._note((), text, is_pure=False)
            return
        names = tuple(f"t{len(self.lines)}_{i}" for i in range(len(results)))
        self._note(names, text, is_pure=True, several=several)
        for name, t in zip(names, results, strict=True):
            self._tensors[id(t)] = weakref.ref(t), name

    def _note(self, results: tuple[str, ...], text: str, is_pure: bool, several: bool = False) -> None:
        left = f"{', '.join(results)}{',' * several} = " if results else ""
        self.lines.append(_Line(results, left + text, frozenset(self._reads), is_pure))
        self._reads.clear()

    def _name(self, t: torch.Tensor) -> str | None:
        ref, name = self._tensors.get(id(t), (None, None))
        return name if ref is not None and ref() is t else None

    def text(self, value: Any) -> str:
        """Python's expression for a value."""
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, torch.Tensor):
            name = self._name(value)
            if name is None and not dispatch.is_constant(value):
                raise Unknown("it reads a tensor that is no argument")
            if name is None:
                return self._constant(value)
            self._reads.add(name)
            return name
        if type(value) in WRITERS:
            function, args = WRITERS[type(value)](value)
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
        """Return the function that makes the calls again, if there can be one."""
        with self._writing():
            returned = self.text(result)
        if not self._knows_all:
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
        """The calls whose results are read, or that write; what is not read again is deleted at once."""
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
    """Run a function on tensors; return its result, and what makes the same calls on others of their layouts.

    The latter is None where there can be none. It returns NotImplemented where it does not serve, such as for tensors
    that do not start at multiples of 16 bytes. The function may ask its tensors for all but their values, at least in
    ways that the dispatcher does not see, as `tolist` and `numpy` are on a CPU.
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
    """Return whether a recording is under way in this thread."""
    return _thread.recorder is not None


def insist_on(traceable: bool) -> None:
    """Keep a recording, if one is under way in this thread, from being replayed unless what runs now is traceable."""
    if _thread.recorder is not None and not traceable:
        _thread.recorder.give_up()


def launched(launch: Launch | None, args: tuple[Any, ...]) -> None:
    """Tell a recording, if one is under way in this thread, that a kernel was launched.

    Args:
        launch: how to launch it again; None if that is not known.
        args: its arguments.
    """
    if _thread.recorder is not None:
        _thread.recorder.launch(launch, args)
