"""Declarations of ops: schemas, arguments by name, namespaces, and visibility to dispatch modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.kernels import ops
from fastlora.kernels.core import library
from fastlora.kernels.core.dispatch import can_bypass_dispatcher
from fastlora.kernels.core.semantic_op import SemanticOp

OPS = [getattr(ops, name) for name in ops.__all__]


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_no_schema_mutates_or_aliases(op: SemanticOp) -> None:
    for target in (op.target, op.backward_target):
        assert not target._schema.is_mutable
        for value in (*target._schema.arguments, *target._schema.returns):
            assert value.alias_info is None


def test_a_schema_that_mutates_raises() -> None:
    with pytest.raises(ValueError, match="mutates none"):
        library.register_op(
            "writes", family="x", schema="(Tensor(a!) x) -> (Tensor y)", outputs=1, **dict.fromkeys(_PARTS)
        )


_PARTS = ("reference", "forward", "backward", "saves")


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_arguments_are_checked_by_name(op: SemanticOp) -> None:
    given: dict[str, Any] = {a.name: None for a in op.arguments if not a.is_optional}
    missing = given.popitem()[0]
    with pytest.raises(TypeError, match=rf"{op.name}.*unknown \['nonsense'\], missing \['{missing}'\]"):
        op(**given, nonsense=1)


def test_editing_a_source_changes_the_namespace(tmp_path: Path) -> None:
    for name, text in (("one.py", "a = 1\n"), ("two.py", "b = 1\n"), ("notes.txt", "kept\n")):
        (tmp_path / name).write_text(text)
    before = library.digest(tmp_path)
    (tmp_path / "notes.txt").write_text("changed\n")
    assert library.digest(tmp_path) == before
    (tmp_path / "two.py").write_text("b = 2\n")
    assert library.digest(tmp_path) != before


def test_the_namespace_has_the_digest_of_the_sources() -> None:
    assert {op.target.namespace for op in OPS} == {f"fastlora_{library.digest(library.KERNELS)}"}


def test_without_gradients_nothing_is_saved() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    arguments = {"gate": x, "up": x, "activation": "silu", "out_dtype": torch.float32}
    assert ops.glu(**arguments).grad_fn is not None
    with torch.no_grad():
        assert ops.glu(**arguments).grad_fn is None
    assert ops.glu(**arguments | {"gate": x.detach(), "up": x.detach()}).grad_fn is None


def test_one_tensor_may_be_passed_for_two_arguments() -> None:
    """Its gradient is the sum of both."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    arguments = {"gate": x, "up": x, "activation": "silu", "out_dtype": torch.float64}
    mine, expected = (torch.autograd.grad(f(**arguments).sum(), x)[0] for f in (ops.glu, ops.glu.reference))
    torch.testing.assert_close(mine, expected)


class _Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_forward_and_backward_operators() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with _Listener() as listener:
        y = ops.glu(gate=x, up=x, activation="silu", out_dtype=torch.float32)
        y.sum().backward()
    assert {ops.glu.target, ops.glu.backward_target} <= set(listener.heard)


def test_only_plain_tensors_bypass_the_dispatcher() -> None:
    x = torch.randn(3)
    assert can_bypass_dispatcher([x, None, torch.nn.Parameter(x)])
    assert not can_bypass_dispatcher([x, torch.empty(3, device="meta")])
    assert not can_bypass_dispatcher([torch._neg_view(x)])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not can_bypass_dispatcher([x])
    assert not can_bypass_dispatcher([x, fake])
    torch.func.vmap(lambda t: [_refused(t)])(x)
    torch.func.grad(lambda t: _refused(t).sum())(x)


def _refused(t: torch.Tensor) -> torch.Tensor:
    assert not can_bypass_dispatcher([t])
    return t
