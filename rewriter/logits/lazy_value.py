"""Values that are computed at their first use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastlora.compat.dispatch import disable_modes, dispatch_modes


class StorageState:
    """Whether other code holds the storage of some values, and may write to it unnoticed."""

    def __init__(self) -> None:
        self.is_shared = False


class LazyValue:
    """A value that is computed at its first use.

    Values that are computed from one another are related. Before an in-place write to one, all of them are computed:
    views then see the write, and copies do not.
    """

    __slots__ = ("__weakref__", "_compute", "_parent", "_related", "_value", "storage")

    def __init__(
        self, compute: Callable[[], torch.Tensor], parent: LazyValue | None = None, storage: StorageState | None = None
    ) -> None:
        self._compute: Callable[[], torch.Tensor] | None = compute
        self._parent = parent
        self._related: list[weakref.ref[LazyValue]] = [] if parent is None else parent._related
        self._value: torch.Tensor | None = None
        self.storage = StorageState() if storage is None else storage
        self._related.append(weakref.ref(self))

    @property
    def is_computed(self) -> bool:
        """Whether this value, or the one that it is computed from, is computed."""
        return self._value is not None or (self._parent is not None and self._parent.is_computed)

    def get(self) -> torch.Tensor:
        """Return the value, computed outside of the caller's gradient and inference modes."""
        if self._value is None:
            assert self._compute is not None
            with torch.inference_mode(False), torch.no_grad(), _without_modes():
                self._value = self._compute()
            self._compute = self._parent = None
        return self._value

    def derive(self, operation: Callable[[torch.Tensor], torch.Tensor], is_view: bool = False) -> LazyValue:
        """Return the lazy result of `operation` on this value."""
        return LazyValue(lambda: operation(self.get()), self, self.storage if is_view else None)

    @staticmethod
    def join(values: list[LazyValue], operation: Callable[[list[torch.Tensor]], torch.Tensor]) -> LazyValue:
        """Return the lazy result of `operation` on several values, all of which are related from then on."""
        made = LazyValue(lambda: operation([value.get() for value in values]))
        related = list({id(ref): ref for value in (made, *values) for ref in value._related}.values())
        for ref in related:
            if (value := ref()) is not None:
                value._related = related
        return made

    def share(self) -> torch.Tensor:
        """Return the value to code that may write to it or keep its storage."""
        for ref in list(self._related):
            if (value := ref()) is not None:
                value.get()
        self.storage.is_shared = True
        return self.get()


@contextmanager
def _without_modes() -> Iterator[None]:
    """Disable active modes: a value is kept, so it must not be a fake tensor only because a mode is active now."""
    if not dispatch_modes():
        yield
        return
    with disable_modes():
        yield
