"""The benchmarked cases: each op at each place where a model uses it, with the arguments of that place.

Activations and base weights have the dtype of the benchmark, adapters are float32 and cast where they are used, as in
PEFT under autocast. Gradients are required for activations and adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.kernels import ops
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.shapes import Shape

Arguments = dict[str, Any]
Randn = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An op at one place of one model.

    Attributes:
        place: the layers or modules that the op replaces, such as "q, k, v".
        tokens: number of tokens, which is the number of rows of the activations.
        rank: rank of the adapters; 0 without adapters.
        sizes: dimensions by the letters of the op's cost formulas.
        build: makes the arguments, given a function that makes random tensors.
        grad_arguments: names of the arguments that require gradients.
    """

    op: SemanticOp
    model: str
    place: str
    tokens: int
    rank: int
    sizes: dict[str, int]
    build: Callable[[Randn, torch.dtype], Arguments]
    grad_arguments: tuple[str, ...]

    def __str__(self) -> str:
        rank = f", r={self.rank}" if self.rank else ""
        return f"{self.op.name} ({self.model}, {self.place}, {self.tokens} tokens{rank})"

    def arguments(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Arguments:
        """Return random arguments; those in `grad_arguments` require gradients."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        return self.arguments_from(randn, dtype)

    def arguments_from(self, randn: Randn, dtype: torch.dtype) -> Arguments:
        """Return arguments whose tensors are made by `randn`."""
        arguments = self.build(randn, dtype)
        complete = dict(zip((a.name for a in self.op.arguments), self.op.order(arguments), strict=False))
        return {name: _set_requires_grad(value, name in self.grad_arguments) for name, value in complete.items()}

    @property
    def directions(self) -> list[str]:
        """The passes to time; "both" is a single one for ops whose forward computes the gradients."""
        if self.op.policy.grads_in_forward:
            return ["both"]
        return ["forward", "backward"] if self.grad_arguments else ["forward"]

    def work(self, direction: str, dtype: torch.dtype) -> tuple[float, float]:
        """Return the floating-point operations and bytes of a pass, by the op's cost formulas."""
        assert self.op.cost is not None
        sizes = {**self.sizes, "b": dtype.itemsize, "w": dtype.itemsize, "p": 4}
        passes = ("forward", "backward") if direction == "both" else (direction,)
        flops, moved = zip(*(getattr(self.op.cost, name).at(sizes) for name in passes), strict=True)
        return sum(flops), sum(moved)


def _set_requires_grad(value: Any, requires_grad: bool) -> Any:
    if isinstance(value, list):
        return [_set_requires_grad(v, requires_grad) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.requires_grad_(requires_grad)
    return value


def cases(shape: Shape, tokens: int, ranks: list[int]) -> Iterator[Case]:
    """Yield the cases of all ops at all places of a model."""
    yield from _norms(shape, tokens)
    if shape.norm == "rms":
        yield from _rotary(shape, tokens)
        yield from _glu(shape, tokens)
    for rank in ranks:
        yield from _projections(shape, tokens, rank)
    yield from _losses(shape, tokens)
    yield _dequantize(shape, tokens)


def _norms(shape: Shape, T: int) -> Iterator[Case]:
    H = shape.hidden
    rms = shape.norm == "rms"

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        x, weight = randn(T, H), randn(H)
        if not rms:
            return {"x": x, "weight": weight, "bias": randn(H), "eps": 1e-12, "out_dtype": dtype}
        inner = torch.float32 if shape.offset else dtype
        dtypes = {"norm_dtype": inner, "scale_dtype": inner, "out_dtype": dtype, "compute_dtype": torch.float32}
        return {"x": x, "weight": weight, "eps": 1e-5, "offset": shape.offset, **dtypes}

    def add_build(randn: Randn, dtype: torch.dtype) -> Arguments:
        return {"residual": randn(T, H), **build(randn, dtype)}

    alone, added = (ops.rms_norm, ops.add_rms_norm) if rms else (ops.layer_norm, ops.add_layer_norm)
    yield Case(alone, shape.name, "norm", T, 0, {"T": T, "H": H}, build, ("x",))
    yield Case(added, shape.name, "residual + norm", T, 0, {"T": T, "H": H, "S": 0}, add_build, ("x", "residual"))


def _rotary(shape: Shape, T: int) -> Iterator[Case]:
    D, heads = shape.head_dim, (shape.heads, shape.kv_heads)

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        angles = torch.outer(torch.arange(T), 1e4 ** -(torch.arange(0, D, 2) / D)).repeat(1, 2)
        like = randn(1)
        return {
            "x": [randn(1, T, n, D).transpose(1, 2) for n in heads],
            "cos": angles.cos().to(like)[None, None],
            "sin": angles.sin().to(like)[None, None],
            "layout": "half",
            "rotary_dim": D,
            "compute_dtype": dtype,
            "out_dtype": dtype,
        }

    sizes = {"T": T, "M": sum(heads), "D": D}
    yield Case(ops.rotary_group, shape.name, "q, k", T, 0, sizes, build, ("x",))


def _glu(shape: Shape, T: int) -> Iterator[Case]:
    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        gate, up = randn(T, shape.intermediate), randn(T, shape.intermediate)
        return {"gate": gate, "up": up, "activation": shape.activation, "out_dtype": dtype}

    yield Case(ops.glu, shape.name, "MLP", T, 0, {"T": T, "I": shape.intermediate}, build, ("gate", "up"))


def _adapter(randn: Randn, N: int, K: int, R: int) -> Arguments:
    """Return the arguments of one adapted layer. B is random, since it is zero only before the first step."""
    f32 = torch.float32
    return {
        "weight": randn(N, K, scale=K**-0.5),
        "lora_a": randn(R, K, dtype=f32, scale=K**-0.5),
        "lora_b": randn(N, R, dtype=f32, scale=0.02),
    }


def _projections(shape: Shape, T: int, R: int) -> Iterator[Case]:
    hidden, inner = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield _single(shape, T, R, "o", hidden, q)
    yield _group(shape, T, R, "q, k, v", [q, kv, kv], hidden)
    if shape.norm == "rms":
        yield _group(shape, T, R, "gate, up", [inner, inner], hidden)
        yield _mlp(shape, T, R)
    else:
        yield _single(shape, T, R, "up", inner, hidden)
    yield _single(shape, T, R, "down", hidden, inner)


def _dtypes(dtype: torch.dtype) -> Arguments:
    return {"base_dtype": dtype, "lora_dtype": dtype, "out_dtype": dtype}


def _single(shape: Shape, T: int, R: int, place: str, N: int, K: int) -> Case:
    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        return {"x": randn(T, K), **_adapter(randn, N, K, R), "scaling": 2.0, **_dtypes(dtype)}

    sizes = {"T": T, "N": N, "K": K, "R": R}
    return Case(ops.lora_linear, shape.name, place, T, R, sizes, build, ("x", "lora_a", "lora_b"))


def _group(shape: Shape, T: int, R: int, place: str, widths: list[int], K: int) -> Case:
    biased = shape.attention_bias and place == "q, k, v"

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        members = [_adapter(randn, N, K, R) for N in widths]
        lists = {name: [member[name] for member in members] for name in members[0]}
        biases = {"bias": [randn(N) for N in widths]} if biased else {}
        return {"x": randn(T, K), **lists, **biases, "scaling": [2.0] * len(widths), **_dtypes(dtype)}

    sizes = {"T": T, "N": sum(widths), "K": K, "R": R, "M": len(widths)}
    return Case(ops.lora_group, shape.name, place, T, R, sizes, build, ("x", "lora_a", "lora_b"))


def _mlp(shape: Shape, T: int, R: int) -> Case:
    hidden, inner = shape.hidden, shape.intermediate
    layers = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        given: Arguments = {"x": randn(T, hidden), "activation": shape.activation, **_dtypes(dtype)}
        for layer, (N, K) in layers.items():
            given |= {f"{layer}_{name}": value for name, value in _adapter(randn, N, K, R).items()}
            given[f"{layer}_scaling"] = 2.0
        return {**given, "proj_dtype": dtype, "hidden_dtype": dtype}

    grads = ("x", *(f"{layer}_{name}" for layer in layers for name in ("lora_a", "lora_b")))
    return Case(ops.lora_mlp, shape.name, "MLP", T, R, {"T": T, "H": hidden, "I": inner, "R": R}, build, grads)


def _losses(shape: Shape, T: int) -> Iterator[Case]:
    H, V = shape.hidden, shape.vocabulary

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        x = randn(T, H)
        return {
            "x": x,
            "weight": randn(V, H, scale=H**-0.5),
            "labels": torch.randint(V, (T,), device=x.device),
            "scale": 1.0,
            "softcap": shape.softcap,
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "z_loss": 0.0,
            "base_dtype": dtype,
            "logits_dtype": torch.float32,
        }

    for place, grads in (("frozen head", ("x",)), ("trained head", ("x", "weight"))):
        sizes = {"T": T, "H": H, "V": V, "S": int("weight" in grads)}
        yield Case(ops.linear_cross_entropy, shape.name, place, T, 0, sizes, build, grads)


def _dequantize(shape: Shape, T: int) -> Case:
    """Return a case with an NF4 weight with double quantization; the number of tokens does not affect it."""
    N, K, block, nested_block = shape.intermediate, shape.hidden, 64, 256

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        device = randn(1).device

        def random_bytes(n: int) -> torch.Tensor:
            return torch.randint(256, (n,), dtype=torch.uint8, device=device)

        return {
            "packed": random_bytes(N * K // 2),
            "absmax": random_bytes(N * K // block),
            "nested_absmax": randn(-(-N * K // block // nested_block), dtype=torch.float32),
            "nested_code": randn(256, dtype=torch.float32),
            "offset": randn(1, dtype=torch.float32)[0],
            "blocksize": block,
            "nested_blocksize": nested_block,
            "quant_type": "nf4",
            "rows": N,
            "cols": K,
            "dtype": dtype,
        }

    return Case(ops.dequantize_4bit, shape.name, f"{N} x {K}", T, 0, {"N": N, "K": K, "S": block}, build, ())
