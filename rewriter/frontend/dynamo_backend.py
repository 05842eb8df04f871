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
    """Return the session that collects what the backend compiles in this process, for `fastlora.report()`."""
    return Session(Options())


def fastlora_backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph: the TorchDynamo backend `fastlora`.

    Args:
        gm, inputs: the graph, and example inputs.
        options: `lower`, `strict`, `verify` and `defer_logits`, as for `fastlora.compile`.
        mode: as for `fastlora.compile`.
    """
    session = default_session()
    known = {"lower", "strict", "verify", "defer_logits"}
    if unknown := (options or {}).keys() - known:
        raise FastLoRAError(f"options must be among {sorted(known)}; got {sorted(unknown)}")
    if (options or {}).get("verify") == "first-step":
        raise FastLoRAError("verify='first-step' needs the model: use fastlora.compile(model, verify='first-step')")
    session.options = Options(mode=mode or "default", **(options or {}))
    return compile_graph(session, gm, inputs)
