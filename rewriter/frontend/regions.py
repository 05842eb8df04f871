"""Finding the regions of a model that are compiled separately: each repeated block, and the modules around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Region:
    """A module that is compiled by itself, and its path in the model."""

    name: str
    module: nn.Module


def find_regions(model: nn.Module, head: nn.Module | None = None) -> list[Region]:
    """Return the blocks of a model, and the modules outside of them that may contain candidates for fusion.

    A block is an entry of a `ModuleList` or `Sequential` with several modules of its class, such as a decoder layer. A
    model without blocks is one region. `head` is in no region, so that its logits can be deferred.
    """
    found = list(_regions(model, "", {head} if head is not None else set()))
    return found if any(_is_repeated(region.module, model) for region in found) else [Region("", model)]


def _regions(module: nn.Module, name: str, excluded: set[nn.Module]) -> Iterator[Region]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if child in excluded:
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_block(child, module):
            yield Region(path, child)
        elif _contains_blocks(child) or any(inner in excluded for inner in child.modules()):
            yield from _regions(child, path, excluded)
        elif _may_match(child):
            yield Region(path, child)


def _is_block(child: nn.Module, container: nn.Module) -> bool:
    same_class = sum(type(sibling) is type(child) for sibling in container.children())
    return same_class > 1 and any(True for _ in child.children()) and any(True for _ in child.parameters())


def _contains_blocks(module: nn.Module) -> bool:
    return any(
        isinstance(container, (nn.ModuleList, nn.Sequential)) and _is_block(child, container)
        for container in module.modules()
        for child in container.children()
    )


def _is_repeated(module: nn.Module, model: nn.Module) -> bool:
    return any(
        module in set(container.children()) and _is_block(module, container)
        for container in model.modules()
        if isinstance(container, (nn.ModuleList, nn.Sequential))
    )


def _may_match(module: nn.Module) -> bool:
    """Return whether a module outside of the blocks can match a rule: embeddings and layers of torch.nn cannot."""
    known = is_torch_class(module) or isinstance(module, nn.Embedding)
    return not known and any(True for _ in module.parameters())


def is_torch_class(module: nn.Module) -> bool:
    """Return whether the module's class comes with PyTorch: TorchDynamo does not trace its `__call__` by itself."""
    return type(module).__module__.startswith("torch.nn.")
