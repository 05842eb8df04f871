"""The canonical view: one term for many spellings, identities that are skipped, and casts by their effect."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import bf16, f32, randn, trace, view_of
from torch import Tensor, fx

from fastlora.graph.fake_values import known_equal
from fastlora.graph.term import Term
from fastlora.graph.view import View

X, Y, W = randn(2, 3, 8, grad=False), randn(2, 3, 8, seed=1, grad=False), randn(5, 8, grad=False)


def _result(function: Callable[..., Any], *inputs: Tensor) -> tuple[View, fx.Node]:
    view = view_of(function, *inputs)
    (output,) = (node for node in view.graph.nodes if node.op == "output")
    return view, output.args[0][0]


def _term(function: Callable[..., Any], *inputs: Tensor) -> Term | None:
    view, node = _result(function, *inputs)
    return view.term(node)


SPELLINGS: dict[str, list[Callable[[Tensor, Tensor], Any]]] = {
    "add": [lambda x, y: x + y, lambda x, y: torch.add(x, y), lambda x, y: x.add(y)],
    "sub": [lambda x, y: x - y, lambda x, y: torch.sub(x, y), lambda x, y: x.sub(y)],
    "mul": [
        lambda x, y: x * y,
        lambda x, y: torch.mul(x, y),
        lambda x, y: torch.multiply(x, y),
        lambda x, y: x.mul(y),
        lambda x, y: x * 2,
        lambda x, y: 2 * x,
    ],
    "div": [lambda x, y: x / y, lambda x, y: torch.div(x, y), lambda x, y: x.div(y), lambda x, y: 1.0 / x],
    "neg": [lambda x, y: -x, lambda x, y: torch.neg(x), lambda x, y: x.neg()],
    "square": [
        lambda x, y: x**2,
        lambda x, y: x * x,
        lambda x, y: x.pow(2),
        lambda x, y: torch.pow(x, 2.0),
        lambda x, y: x.square(),
        lambda x, y: torch.square(x),
        lambda x, y: x * x.contiguous(),
    ],
    "sqrt": [lambda x, y: torch.sqrt(x), lambda x, y: x.sqrt(), lambda x, y: x**0.5],
    "rsqrt": [lambda x, y: torch.rsqrt(x), lambda x, y: x.rsqrt(), lambda x, y: x**-0.5, lambda x, y: x.pow(-0.5)],
    "mean": [
        lambda x, y: x.mean(-1, keepdim=True),
        lambda x, y: x.mean(dim=-1, keepdim=True),
        lambda x, y: x.mean(2, True),
        lambda x, y: x.mean((-1,), keepdim=True),
        lambda x, y: torch.mean(x, dim=[-1], keepdim=True),
    ],
    "var": [
        lambda x, y: x.var(-1, unbiased=False, keepdim=True),
        lambda x, y: x.var(-1, False, True),
        lambda x, y: torch.var(x, -1, unbiased=False, keepdim=True),
    ],
    "silu": [
        lambda x, y: F.silu(x),
        lambda x, y: torch.nn.SiLU()(x),
        lambda x, y: F.silu(x + 1, inplace=True),
    ],
    "gelu": [lambda x, y: F.gelu(x), lambda x, y: torch.nn.GELU()(x), lambda x, y: F.gelu(x, approximate="none")],
    "gelu_tanh": [lambda x, y: F.gelu(x, approximate="tanh"), lambda x, y: torch.nn.GELU("tanh")(x)],
    "tanh": [lambda x, y: torch.tanh(x), lambda x, y: x.tanh(), lambda x, y: F.tanh(x)],
    "cat": [
        lambda x, y: torch.cat((x, y), dim=-1),
        lambda x, y: torch.cat([x, y], 2),
        lambda x, y: torch.concat((x, y), -1),
    ],
    "stack": [lambda x, y: torch.stack((x, y), dim=-1), lambda x, y: torch.stack([x, y], 3)],
    "flatten": [lambda x, y: x.flatten(-2), lambda x, y: torch.flatten(x, 1, 2), lambda x, y: x.flatten(-2, -1)],
    "dropout": [
        lambda x, y: F.dropout(x, 0.5),
        lambda x, y: F.dropout(x, p=0.5, training=True),
        lambda x, y: F.dropout(x + 1, 0.5, inplace=True),
    ],
    "reshape": [lambda x, y: x.view(6, 8), lambda x, y: x.reshape(-1, 8), lambda x, y: x.view((6, -1))],
}


@pytest.mark.parametrize("op", SPELLINGS)
def test_all_spellings_of_an_operation_read_as_one(op: str) -> None:
    for spelling in SPELLINGS[op]:
        term = _term(spelling, X, Y)
        assert term is not None
        assert term.op == op


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.t()),
        lambda x, w: x.matmul(w.transpose(0, 1)),
        lambda x, w: x @ w.transpose(-1, -2),
        lambda x, w: x @ w.mT,
    ],
)
def test_a_product_with_a_transposed_matrix_is_a_linear_layer(spelling: Callable[[Tensor, Tensor], Tensor]) -> None:
    view, node = _result(spelling, X, W)
    term = view.term(node)
    assert term is not None
    assert term.op == "linear"
    assert [view.producer(term.args[name]).name for name in ("input", "weight")] == ["l_x_", "l_w_"]


@pytest.mark.parametrize(
    ("spelling", "op"),
    [
        (lambda w: w.mT, "mT"),
        (lambda w: w.transpose(-2, -1), "mT"),
        (lambda w: w.transpose(2, 1), "mT"),
        (lambda w: w[0].transpose(0, -1), "transposed"),
        (lambda w: w.transpose(0, 1), None),
        (lambda w: w.transpose(0, 2), None),
        (lambda w: w.sum().transpose(0, -1), None),
    ],
)
def test_a_stack_of_matrices_is_transposed_in_its_last_two_dimensions(
    spelling: Callable[[Tensor], Tensor], op: str | None
) -> None:
    view, node = _result(lambda w: spelling(w).exp(), X)
    term = view.term(node.all_input_nodes[0])
    assert (None if term is None else term.op) == op


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.sub(x, y, alpha=2),
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
        lambda x, y: x.mean(1, keepdim=True),
        lambda x, y: x.mean(-1),
        lambda x, y: x.mean((1, 2), keepdim=True),
        lambda x, y: x.mean(-1, keepdim=True, dtype=torch.float64),
        lambda x, y: x.var(-1, keepdim=True),
        lambda x, y: torch.cat((x, y), 0),
        lambda x, y: torch.stack((x, y), 0),
        lambda x, y: x.flatten(0, 1),
        lambda x, y: F.silu(x, inplace=True),
        lambda x, y: torch.addmm(x[0, :, :3], x[1], y[0].T, beta=2),
        lambda x, y: x[0],
        lambda x, y: x[:, 1:],
        lambda x, y: x[..., None],
        lambda x, y: x[torch.tensor([0])],
        lambda x, y: x.transpose(0, 1),
        lambda x, y: x.sum(-1, keepdim=True),
        lambda x, y: x.to(torch.float64).view(torch.int64),
    ],
)
def test_unsupported_calls_have_no_term(function: Callable[[Tensor, Tensor], Any]) -> None:
    term = _term(function, X, Y)
    assert term is None or term.op in ("transposed",)


IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "to its dtype": lambda x: x.to(torch.float32),
    "to another's dtype": lambda x: x.to(x.dtype),
    "type_as": lambda x: x.type_as(x),
    "type": lambda x: x.type(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "times one": lambda x: x * 1.0,
    "one times": lambda x: 1 * x,
    "over one": lambda x: x / 1.0,
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "dropout in evaluation": lambda x: F.dropout(x, 0.5, training=False),
    "view to its shape": lambda x: x.view(2, 3, 8),
    "reshape to its shape": lambda x: x.reshape(2, -1, 8),
    "all of it": lambda x: x[:, 0:, :],
    "all of its last dimension": lambda x: x[..., :8],
    "everything": lambda x: x[...],
    "several": lambda x: (x.float() * 1).contiguous().view(2, 3, 8),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_are_skipped(name: str) -> None:
    def function(x: Tensor) -> Any:
        source = x + 2
        return torch.tanh(IDENTITIES[name](source)), source

    view = view_of(function, X)
    source, tanh = (next(n for n in view.graph.nodes if n.name.startswith(name)) for name in ("source", "tanh"))
    term = view.term(tanh)
    assert term is not None
    assert view.producer(term.args["input"]) is source
    assert tanh in view.users(source)
    assert {user.op for user in view.users(source)} == {"call_function", "output"}
    assert all(view.producer(member) is source for member in view.value_class(tanh.args[0]))


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a narrowing": lambda x: x.to(bf16),
    "a widening": lambda x: x.double(),
    "times one, of a wider type": lambda x: x * torch.tensor(1.0, dtype=torch.float64),
    "times two": lambda x: x * 2,
    "times true": lambda x: x * True,
    "another shape": lambda x: x.view(3, 2, 8),
    "a part": lambda x: x[..., :7],
    "an active dropout": lambda x: F.dropout(x, 0.5),
    "detach": lambda x: x.detach(),
    "a clone of another's gradient": lambda x: x.detach().clone(),
    "other memory": lambda x: x.expand(2, 3, 8) + 0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_that_changes_anything_is_not_an_identity(name: str) -> None:
    view, node = _result(lambda x: OTHERS[name](x), X)
    assert all(view.producer(node) is not placeholder for placeholder in view.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to(bf16),
        lambda x: x.bfloat16(),
        lambda x: x.type(bf16),
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.to(dtype=bf16),
        lambda x: x.type_as(torch.zeros(1, dtype=bf16)),
        lambda x: x.to(torch.zeros(1, dtype=bf16)),
    ],
)
def test_a_change_of_dtype_is_a_cast_however_it_is_spelled(cast: Callable[[Tensor], Tensor]) -> None:
    term = _term(cast, X)
    assert term is not None
    assert term.op == "cast"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
def test_a_conversion_to_integers_is_not_a_cast(dtype: torch.dtype) -> None:
    """It drops fractions and gradients, so no op may skip it."""
    assert _term(lambda x: x.to(dtype), X) is None
    assert _term(lambda x: x.to(torch.float32), X.to(dtype)) is None


@pytest.mark.parametrize("copy", [lambda x: x.clone(), lambda x: x * 1.0, lambda x: x.view(2, 3, 8)])
def test_a_detached_copy_is_another_value(copy: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> Any:
        with torch.no_grad():
            return copy(x)

    view, node = _result(function, randn(2, 3, 8))
    assert view.producer(node) is node
    assert view.term(node) is None


def test_dtypes_come_from_the_trace_not_from_arguments() -> None:
    """Under autocast a layer with float32 arguments returns bfloat16, so the cast after it is not a no-op."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            y = F.linear(x, w)
            return y.float()

    term = _term(function, X, W)
    assert term is not None
    assert term.op == "cast"


# ---- slices of the last dimension


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (lambda x: x[..., :3], (0, 3, 1)),
        (lambda x: x[..., 3:], (3, 8, 1)),
        (lambda x: x[..., -3:], (5, 8, 1)),
        (lambda x: x[..., 2:-2], (2, 6, 1)),
        (lambda x: x[..., ::2], (0, 8, 2)),
        (lambda x: x[..., 1::2], (1, 8, 2)),
        (lambda x: x[..., 3:100], (3, 8, 1)),
        (lambda x: x[:, :, :3], (0, 3, 1)),
        (lambda x: x[:, 0:, 1:3], (1, 3, 1)),
        (lambda x: x.chunk(2, dim=-1)[0], (0, 4, 1)),
        (lambda x: x.chunk(2, -1)[1], (4, 8, 1)),
        (lambda x: torch.chunk(x, 3, dim=2)[1], (3, 6, 1)),
        (lambda x: torch.chunk(x, 3, dim=2)[2], (6, 8, 1)),
        (lambda x: x.split(3, dim=-1)[1], (3, 6, 1)),
        (lambda x: x.split(3, dim=-1)[2], (6, 8, 1)),
        (lambda x: x.split([2, 5, 1], dim=-1)[1], (2, 7, 1)),
        (lambda x: torch.split(x, (2, 6), -1)[1], (2, 8, 1)),
    ],
)
def test_parts_of_the_last_dimension_are_slices_with_bounds(
    function: Callable[[Tensor], Tensor], bounds: tuple[int, int, int]
) -> None:
    term = _term(function, X)
    assert term is not None
    assert term.op == "slice"
    assert (term.args["start"], term.args["stop"], term.args["step"]) == bounds
    start, stop, step = bounds
    assert torch.equal(function(X), X[..., start:stop:step])


def test_slices_of_other_dimensions_have_no_term() -> None:
    for function in (
        lambda x: x.chunk(2, 0)[1],
        lambda x: x.split(1, 1)[1],
        lambda x: x[1:],
        lambda x: x[:, 1:, 2:],
        lambda x: x[0, ..., 2:],
    ):
        assert _term(function, X) is None


def test_slices_of_an_unknown_size_have_no_bounds() -> None:
    x = randn(2, 3, 8)
    torch._dynamo.mark_dynamic(x, 2)
    torch._dynamo.reset()
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(lambda x: x[..., x.shape[-1] // 2 :].exp(), backend=backend)(x)
    view = View(graphs[0])
    (slice_node,) = [n for n in graphs[0].nodes if n.target is operator.getitem and isinstance(n.args[1], tuple)]
    assert view.term(slice_node) is None


# ---- the view leaves everything as it is


def test_reading_a_graph_does_not_change_it() -> None:
    gm, _ = trace(lambda x, y: (x.float() * 1.0 + y.clone())[..., :4].contiguous(), (X, Y))
    before = gm.code
    View(gm.graph)
    gm.recompile()
    assert gm.code == before


def test_sizes_are_known_equal_only_if_they_always_are() -> None:
    assert known_equal(3, 3)
    assert not known_equal(3, 4)
    sizes: list[Any] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        sizes.extend(n.meta["example_value"].shape[0] for n in gm.graph.nodes if n.op == "call_function")
        shapes = sizes[0].node.shape_env
        before = len(shapes.guards)
        assert known_equal(sizes[0], sizes[0])
        assert not known_equal(sizes[0], 6)
        assert not known_equal(sizes[0], sizes[1])
        assert len(shapes.guards) == before
        return gm.forward

    x, y = randn(6, 2), randn(5, 2)
    for tensor in (x, y):
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.reset()
    torch.compile(lambda x, y: (torch.exp(x), torch.exp(y)), backend=backend)(x, y)
    assert len(sizes) == 2


def test_a_raised_op_is_seen_only_at_its_root() -> None:
    from fastlora.patterns.mlp import glu

    view, node = _result(lambda x, y: F.silu(x) * y, X, Y)
    match = glu.find(view, node)
    assert match is not None
    assert match.root is node
    assert not view.raised
    assert match.dtype() == f32
