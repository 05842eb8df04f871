"""A fake for copies between a GPU and its host, both on the CPU; copies end when they are waited for."""

from __future__ import annotations

from typing import Any

import torch


class Copy:
    """A copy that is made only when it ends."""

    def __init__(self, to: torch.Tensor, of: torch.Tensor, after: Copy | None = None) -> None:
        self.to, self.of, self.after, self.over = to, of, after, False

    def end(self) -> None:
        if not self.over:
            if self.after is not None:
                self.after.end()
            self.to.copy_(self.of)
            self.over = True


class LateCopies:
    """Copies that do not end before they are waited for, or `end` is called."""

    def __init__(self, bytes_per_flop: float = 1e9) -> None:
        self.ratio = bytes_per_flop
        self.log: list[tuple[str, int]] = []
        self.open: list[Copy] = []
        self.waits = 0

    def supports(self, device: torch.device) -> bool:
        return True

    def bytes_per_flop(self, device: torch.device) -> float:
        return self.ratio

    def to_host(self, memory: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self._start("to_host", torch.full_like(memory, 77), memory)

    def to_device(self, host: torch.Tensor, left: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
        return self._start("to_device", torch.full_like(host, 78), host, left)

    def is_done(self, end: Copy) -> bool:
        return end.over

    def wait(self, end: Copy) -> None:
        self.waits += not end.over
        end.end()

    def hold_memory_until(self, end: Copy) -> None:
        self.wait(end)

    def end(self) -> None:
        for copy in self.open:
            copy.end()

    def _start(self, what: str, to: torch.Tensor, of: torch.Tensor, after: Any = None) -> tuple[torch.Tensor, Copy]:
        copy = Copy(to, of, after)
        self.log.append((what, of.nbytes))
        self.open.append(copy)
        return to, copy
