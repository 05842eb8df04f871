"""`torch.compile(model, backend="fastlora")`, found through the entry-point group `torch_dynamo_backends`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import fx

from fastlora.errors import FastLoRAError
from fastlora.frontend.compile_graph import compile_graph
from fastlora.frontend.options import Options
from fastlora.frontend.session import Session


@cache
def default_session() -> Session:
    """The session that collects what the backend of this process compiles, for `fastlora.report()`."""
    return Session(Options())


def fastlora_backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """A TorchDynamo backend.

    Args:
        gm, inputs: what TorchDynamo gives.
        options: `lower`, `strict`, `verify` and `defer_logits`, as for `fastlora.compile`.
        mode: Inductor's mode.
    """
    session = default_session()
    known = {"lower", "strict", "verify", "defer_logits"}
    if unknown := (options or {}).keys() - known:
        raise FastLoRAError(f"options {sorted(unknown)} are none of {sorted(known)}")
    if (options or {}).get("verify") == "first-step":
        raise FastLoRAError("verify='first-step' checks a model: use fastlora.compile(model, verify='first-step')")
    session.options = Options(mode=mode or "default", **(options or {}))
    return compile_graph(session, gm, inputs)
