"""The effects of nodes: which inputs they write to, which values share memory, and which modes are active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import WRITES, analyse, bf16, randn, rms_norm, trace, view_of
from torch import Tensor, fx

from fastlora.graph import effects
from fastlora.graph.effects import Mutations, modes
from fastlora.graph.view import View

X = randn(4, 8, grad=False)


def _node(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name.startswith(name))


def _written(write: Callable[[Tensor], object]) -> bool:
    """Return whether the input of `write` is found to be written."""

    def function(x: Tensor) -> Tensor:
        kept = x * 2
        write(kept)
        return kept

    view = view_of(function, randn(2, 3, 16, grad=False))
    return bool(Mutations(view.graph).writers(_node(view.graph, "kept")))


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_found_through_any_view(name: str) -> None:
    assert _written(WRITES[name])


READS: dict[str, Callable[[Tensor], object]] = {
    "mul": lambda x: x * 2,
    "relu": lambda x: F.relu(x),
    "relu of a copy": lambda x: F.relu(x.exp(), inplace=True),
    "empty_like": lambda x: torch.empty_like(x).fill_(1),
    "zeros_like": lambda x: torch.zeros_like(x).add_(x),
    "out= elsewhere": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "setitem elsewhere": lambda x: torch.zeros(4, 16).__setitem__(0, x[0, 0]),
    "an index copies": lambda x: x[torch.tensor([0, 1])].add_(1),
    "view": lambda x: x.view(16, 6),
    "detach": lambda x: x.detach(),
    "getitem": lambda x: x[0],
    "dropout": lambda x: F.dropout(x, 0.5),
    "expand": lambda x: x[:1].expand(4, 3, 16),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_not_writes(name: str) -> None:
    assert not _written(READS[name])


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(8, 4),
    "reshape": lambda x: x.reshape(8, 4),
    "detach": lambda x: x.detach(),
    "row": lambda x: x[0],
    "rows": lambda x: x[1:3],
    "columns": lambda x: x[..., 2:],
    "transpose": lambda x: x.transpose(0, 1),
    "T": lambda x: x.T,
    "t": lambda x: x.t(),
    "flatten": lambda x: x.flatten(),
    "chunk": lambda x: x.chunk(2, 0)[1],
    "chunk of the last dimension": lambda x: x.chunk(2, -1)[1],
    "split": lambda x: x.split(1)[0],
    "unbind": lambda x: x.unbind()[0],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x.squeeze(),
    "expand": lambda x: x.expand(3, 4, 8),
    "permute": lambda x: x.permute(1, 0),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "diagonal": lambda x: x.diagonal(),
    "view_as": lambda x: x.view_as(x),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)),
    "real": lambda x: x.real,
    "mT": lambda x: x.mT,
    "data": lambda x: x.data,
    "other dtype": lambda x: x.view(torch.int32),
    "no-op cast": lambda x: x.float(),
    "no-op contiguous": lambda x: x.contiguous(),
    "two steps": lambda x: x.unsqueeze(0)[0][1:].flatten(),
}


@pytest.mark.parametrize("name", ALIASES)
def test_a_view_aliases_its_base(name: str) -> None:
    """A write to the base writes to the view, and the other way round."""

    def function(x: Tensor) -> Any:
        source = x * 2
        seen = ALIASES[name](source)
        source.mul_(3)
        return source, seen

    gm, _ = trace(function, (X,))
    view = View(gm.graph)
    source, (output,) = _node(gm.graph, "source"), [n for n in gm.graph.nodes if n.op == "output"]
    seen = output.args[0][1]
    mutations = Mutations(view.graph)
    assert mutations.storage(source) is mutations.storage(seen)
    assert mutations.writers(seen)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Viewed(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1)


@pytest.mark.parametrize(("function", "shares"), [(Doubled, False), (Viewed, True)])
def test_an_autograd_functions_result_aliases_what_its_forward_returns(function: Any, shares: bool) -> None:
    def region(x: Tensor) -> Tensor:
        y = x * 1.5
        made = function.apply(y)
        made.detach().add_(1)
        return y.sum()

    view = view_of(region, randn(3, 4))
    assert bool(view.mutations.writers(_node(view.graph, "y"))) is shares


def test_unrelated_values_are_not_written() -> None:
    def function(x: Tensor) -> Any:
        first, second = x * 2, x * 3
        second[0] = 1.0
        return first, second

    view = view_of(function, X)
    mutations = Mutations(view.graph)
    assert not mutations.writers(_node(view.graph, "first"))
    assert mutations.writers(_node(view.graph, "second"))


def test_a_node_that_cannot_be_probed_counts_as_a_write() -> None:
    """An operator that cannot run on fake tensors may have any effect."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3)
    unknown = graph.call_function(_needs_values, (x,))
    unknown.meta["example_value"] = torch.empty(2, 3)
    graph.output(unknown)
    assert Mutations(graph).writers(x) == [unknown]


def _needs_values(x: Tensor) -> Tensor:
    return x * float(x.sum().item()) if x.numel() == 6 and x.sum().item() else x


def test_an_operator_with_a_mutable_schema_is_a_write() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["example_value"] = torch.empty(2, 3)
    write = graph.call_function(torch.ops.aten.copy_.default, (x, y))
    write.meta["example_value"] = torch.empty(2, 3)
    graph.output(write)
    mutations = Mutations(graph)
    assert mutations.writers(x) == [write]
    assert not mutations.writers(y)


def test_a_higher_order_kernel_launch_is_a_write() -> None:
    """TorchDynamo traces a user's Triton kernel as a higher-order op that writes to its arguments."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3)
    launch = graph.call_function(
        triton_kernel_wrapper_mutation,
        (),
        {
            "kernel_idx": 0,
            "constant_args_idx": 0,
            "grid": [(1, 1, 1)],
            "tma_descriptor_metadata": {},
            "kwargs": {"x": x},
        },
    )
    graph.output(x)
    assert Mutations(graph).writers(x) == [launch]


# ---- modes


def _modes_of(function: Callable[..., Any], *names: str) -> list[Any]:
    gm, _ = trace(function, (X,))
    found = modes(gm.graph)
    return [found[_node(gm.graph, name)] for name in names]


def test_gradient_modes_are_tracked_inside_and_after_regions() -> None:
    def function(x: Tensor) -> Any:
        before = x * 2
        with torch.no_grad():
            within = before * 3
            with torch.enable_grad():
                deep = within * 4
        after = deep * 5
        return after, x

    before, within, deep, after = _modes_of(function, "before", "within", "deep", "after")
    assert [mode[0] for mode in (before, within, deep, after)] == [True, False, True, True]
    assert before == after


def test_autocast_regions_are_distinguished_and_nest() -> None:
    def function(x: Tensor) -> Any:
        before = x * 2
        with torch.autocast("cpu", dtype=bf16):
            first = before * 3
            with torch.autocast("cpu", enabled=False):
                inner = first * 4
            rest = inner * 5
        with torch.autocast("cpu", dtype=bf16):
            second = rest * 6
        after = second * 7
        return after, x

    before, first, inner, rest, second, after = _modes_of(
        function, "before", "first", "inner", "rest", "second", "after"
    )
    assert before == after
    assert first == rest
    assert len({before, first, inner, second}) == 4


def test_probing_enters_no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast caches casts of weights until its outermost region ends, so one that is left open would keep them
    forever."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("a reason"), torch.autocast("cpu", dtype=bf16):
            return F.linear(x, w)

    module, _ = trace(function, [X, randn(8, 8)])
    monkeypatch.setattr(effects, "_PROBED", {})  # other tests may have filled it
    Mutations(module.graph)
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    assert depth == 1
    assert not torch.is_autocast_enabled("cpu")
    assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None


def test_inference_mode_regions_are_tracked() -> None:
    def function(x: Tensor) -> Any:
        before = x * 2
        with torch.inference_mode():
            within = before * 3
        return before, within

    before, within = _modes_of(function, "before", "within")
    assert before != within


def test_a_graph_starts_in_the_enclosing_mode() -> None:
    with torch.no_grad():
        (mode,) = _modes_of(lambda x: x * 2, "mul")
    (other,) = _modes_of(lambda x: x * 2, "mul")
    assert (mode[0], other[0]) in ((True, True), (False, True))


def test_torch_func_transforms_are_neither_probed_nor_rewritten() -> None:
    """Running their start or end would change later code, and an op inside sees one tensor for several."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.vmap(lambda row: rms_norm(row, w))(x) + rms_norm(x, w)

    outcome = analyse(function, randn(4, 8), randn(8))
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert outcome.ops == ["rms_norm"]
    assert "torch.func" in outcome.missed()
    outcome.assert_close()
