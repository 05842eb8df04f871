"""The bodies within a traced graph that run as ordinary code, such as checkpointed regions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fastlora.compat.dispatch import HigherOrderOperator
from fastlora.graph.effects import BODIES


def bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield a module and the bodies that it runs as ordinary code, innermost last."""
    yield gm
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and node.target.name() in BODIES:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and isinstance(
                    body := getattr(gm, str(source.target), None), fx.GraphModule
                ):
                    yield from bodies(body)
