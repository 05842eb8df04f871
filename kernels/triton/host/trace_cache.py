"""Forms that play from a tape: what a form did in a call like this one, as a straight line of calls.

A form finds out from shapes, strides and dtypes what to allocate, which products are cuBLAS's and which kernels to
launch with what. That takes the host several times as long as the calls that come of it, and where layers are short, or
their activations on their way to the host, the device waits for it. So the second time that a form is called with
arguments that are alike, its calls are recorded, PyTorch's operators as the dispatcher sees them and Triton's launches
as `precompile.py` makes them, and written as a Python function with nothing else in it, which then is what runs.

Arguments are alike if they differ in nothing but the tensors' content and address: shapes, strides, dtypes, devices,
which of them are the same tensor, whether they start at multiples of 16 bytes, and the values of all others. What the
calls read has to be among the arguments or come of earlier calls, or the form never plays from a tape.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.core import dispatch
from fastlora.kernels.core.implementations import Form
from fastlora.kernels.core.quantized_weight import Encoded
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.kernel_cache import descriptor, heard

MOST_KINDS = 256
"""Kinds of calls of one form that are known; lengths that never come back are not to fill the memory."""
_PYTHON = {
    torch.ops.aten.empty.memory_format: torch.empty,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.t.default: torch.t,
    torch.ops.aten.view.default: torch.Tensor.view,
    torch.ops.aten.cat.default: torch.cat,
    torch.ops.aten.split_with_sizes.default: torch.split_with_sizes,
}
"""What is called in place of operators, with the same arguments: Python's way to them is shorter there."""


class Unknown(Exception):
    """A form does what no tape can play."""


class _Line(NamedTuple):
    """A call: what it assigns, its text, the names that it reads, and whether it matters to nobody else."""

    results: tuple[str, ...]
    text: str
    reads: frozenset[str]
    is_pure: bool


class _Recorder(TorchDispatchMode):
    """Writes down calls, and names what they take and give."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self._knows_all = True
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._reads: set[str] = set()
        self._device = inputs[0].device
        for i, t in enumerate(inputs):
            self._tensors.setdefault(id(t), (weakref.ref(t), f"i{i}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with self._writing():
            self._operator(func, args, kwargs, result)
        return result

    def launch(self, again: Callable[[tuple[Any, ...]], Any] | None, args: tuple[Any, ...]) -> None:
        """Notes a launch; an `precompile.Listener`."""
        with self._writing():
            if again is None:
                raise Unknown("it launches a kernel as none was launched before")
            self._note((), f"{self._constant(again)}({self.text(args)})", is_pure=False)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Goes on where something cannot be written, without a tape in the end."""
        try:
            yield
        except Unknown:
            self._knows_all = False

    def _operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [*map(self.text, args), *(f"{name}={self.text(value)}" for name, value in kwargs.items())]
        text = f"{self._constant(_PYTHON.get(func, func))}({', '.join(given)})"
        several = isinstance(result, (list, tuple))
        results = list(result) if several else [result]
        if not all(isinstance(t, torch.Tensor) for t in results):
            if not self._reads:
                return  # a question that has nothing to do with tensors, such as for dtypes
            raise Unknown(f"{func} gives what is no tensor")
        if any(t.device != self._device for t in results):
            raise Unknown(f"{func} takes values to another device, where Python may look at them")
        is_known = any(self._name(t) is not None for t in results)
        if is_known or func._schema.is_mutable:
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
        """A value as Python has it."""
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
        if isinstance(value, TensorDescriptor):
            shapes = map(self._constant, (value.shape, value.strides, value.block_shape))
            return f"descriptor({self.text(value.base)}, {', '.join(shapes)})"
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

    def tape(self, inputs: int, result: Any) -> Callable[..., Any] | None:
        """The function that plays, if there can be one."""
        with self._writing():
            returned = self.text(result)
        if not self._knows_all:
            return None
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
        names = ", ".join(f"i{i}" for i in range(inputs))
        body = [*reversed(lines), f"return {returned}"]
        source = "\n    ".join([f"def play({names}):", *body])
        scope = {**self.constants, "descriptor": descriptor}
        exec(source, scope)
        return scope["play"]  # type: ignore[no-any-return]


class _Thread(threading.local):
    records = False


_thread = _Thread()
_stopped = False


@contextmanager
def stopped() -> Iterator[None]:
    """Has forms run themselves, for tests and measurements of what they do."""
    global _stopped
    before, _stopped = _stopped, True
    try:
        yield
    finally:
        _stopped = before


def kind(arguments: dict[str, Any]) -> tuple[Hashable, list[torch.Tensor]]:
    """What a call has in common with those that are alike, and its tensors."""
    found: list[Hashable] = [*arguments]
    tensors: list[torch.Tensor] = []
    places: dict[int, int] = {}
    _look(arguments.values(), found, tensors, places)
    return tuple(found), tensors


def _look(values: Any, found: list[Hashable], tensors: list[torch.Tensor], places: dict[int, int]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            place = places.setdefault(id(value), len(tensors))
            aligned = value.data_ptr() % 16 == 0
            found.append((value.dtype, value.shape, value.stride(), value.device, aligned, place))
            tensors.append(value)
        elif type(value) in (list, tuple):
            found.append(len(value))
            _look(value, found, tensors, places)
        elif type(value) is dict:
            found.append(tuple(value))
            _look(value.values(), found, tensors, places)
        elif isinstance(value, Encoded):
            found.append(value.maker.name)
            _look(value.values, found, tensors, places)
        else:
            found.append((type(value), value))


def taped(form: Callable[..., Any]) -> Callable[..., Any]:
    """A form's forward or backward, which plays from a tape where one of such a call was recorded.

    It may ask its tensors for all but their values, at least in ways that the dispatcher does not see, as `tolist` and
    `numpy` are on a CPU.
    """
    seen: set[Hashable] = set()
    tapes: dict[Hashable, Callable[..., Any] | None] = {}

    @wraps(form)
    def run(**arguments: Any) -> Any:
        if _stopped or _thread.records or precompile.is_recording() or heard():
            return form(**arguments)
        like, tensors = kind(arguments)
        play = tapes.get(like)
        if play is not None:
            return play(*tensors)
        if like in tapes:
            return form(**arguments)
        if like not in seen:
            if len(seen) < MOST_KINDS:
                seen.add(like)
            return form(**arguments)
        result, tapes[like] = _recorded(form, arguments, tensors)
        return result

    return run


def taped_form(
    forward: Callable[..., tuple[Any, ...]],
    backward: Callable[..., dict[str, Any]],
    serves: Callable[..., bool],
    serves_backward: Callable[..., bool],
    restore: Callable[..., tuple[torch.Tensor, ...]] | None = None,
) -> Form:
    """A Triton form whose functions all play from tapes."""
    again = None if restore is None else taped(restore)
    return Form("triton", taped(forward), taped(backward), serves, serves_backward, again)


def _recorded(
    form: Callable[..., Any], arguments: dict[str, Any], tensors: Sequence[torch.Tensor]
) -> tuple[Any, Callable[..., Any] | None]:
    """What a form gives, and the tape of it, if there can be one."""
    recorder = _Recorder(tensors)
    _thread.records = True
    try:
        with dispatch.unlistened(), precompile.told(recorder.launch), recorder:
            result = form(**arguments)
    finally:
        _thread.records = False
    return result, recorder.tape(len(tensors), result)
