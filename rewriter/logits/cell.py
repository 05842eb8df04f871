"""Values that are computed when they are first used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastlora.compat.dispatch import disable_modes, dispatch_modes


class Memory:
    """Whether the memory of some values is used elsewhere, and may be written to without notice."""

    def __init__(self) -> None:
        self.is_shared = False


class Cell:
    """A value that is computed at its first use.

    Cells that are computed from one another form a family. Before an in-place write to one, all of them are computed:
    those that are views then see the write, copies do not.
    """

    __slots__ = ("__weakref__", "_compute", "_family", "_parent", "_value", "memory")

    def __init__(
        self, compute: Callable[[], torch.Tensor], parent: Cell | None = None, memory: Memory | None = None
    ) -> None:
        self._compute: Callable[[], torch.Tensor] | None = compute
        self._parent = parent
        self._family: list[weakref.ref[Cell]] = [] if parent is None else parent._family
        self._value: torch.Tensor | None = None
        self.memory = Memory() if memory is None else memory
        self._family.append(weakref.ref(self))

    @property
    def is_computed(self) -> bool:
        """Whether this value is computed, or the one that it is computed from."""
        return self._value is not None or (self._parent is not None and self._parent.is_computed)

    def get(self) -> torch.Tensor:
        """Return the value, computed outside of the caller's gradient and inference modes."""
        if self._value is None:
            assert self._compute is not None
            with torch.inference_mode(False), torch.no_grad(), _without_modes():
                self._value = self._compute()
            self._compute = self._parent = None
        return self._value

    def derive(self, operation: Callable[[torch.Tensor], torch.Tensor], is_view: bool = False) -> Cell:
        """Return the cell of what `operation` returns for this value."""
        return Cell(lambda: operation(self.get()), self, self.memory if is_view else None)

    @staticmethod
    def join(cells: list[Cell], operation: Callable[[list[torch.Tensor]], torch.Tensor]) -> Cell:
        """Return the cell of what `operation` returns for several values, whose families become one."""
        made = Cell(lambda: operation([cell.get() for cell in cells]))
        family = list({id(each): each for cell in (made, *cells) for each in cell._family}.values())
        for each in family:
            if (member := each()) is not None:
                member._family = family
        return made

    def share(self) -> torch.Tensor:
        """Return the value to code that may write to it or keep its memory."""
        for relative in list(self._family):
            if (cell := relative()) is not None:
                cell.get()
        self.memory.is_shared = True
        return self.get()


@contextmanager
def _without_modes() -> Iterator[None]:
    """Leave active modes: a value is kept, so it must not be a fake tensor because a mode happens to be active."""
    if not dispatch_modes():
        yield
        return
    with disable_modes():
        yield
