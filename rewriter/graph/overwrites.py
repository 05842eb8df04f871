"""Writes in place that stand for a new value, as in `y += x` where nothing reads the old `y` afterwards.

Such a node may be read, and replaced, as the operation without the write. What has to hold for it is a property of the
graph alone: until the write, the memory belongs to the graph, and after it, nothing sees the memory but through the
node itself.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fastlora.graph.effects import Mutations, is_fresh


def replaces_its_input(node: fx.Node, source: Any, order: dict[fx.Node, float], mutations: Mutations) -> bool:
    """Return whether a node that writes to `source` in place could as well make a new tensor."""
    earlier = [other for other in mutations.sharing(node) if order[other] < order[node]]
    if source not in earlier or not is_fresh(min(earlier, key=order.__getitem__)):
        return False
    users = [user for other in earlier for user in other.users if user is not node]
    # What is not known to return a new tensor might share memory with inputs of another layout.
    return all(order[user] < order[node] and (user in earlier or is_fresh(user)) for user in users)
