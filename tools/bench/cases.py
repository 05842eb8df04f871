"""What is benchmarked: each op at the places where a model uses it, with the arguments that it meets there.

Activations and base weights are bfloat16 (or what is asked for), adapters float32 and cast where they are used, as
PEFT has them under autocast. Gradients are wanted for what LoRA trains and what leads to it.
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
    """An op at one place of one model, for some tokens and some rank (0 where there is no adapter)."""

    op: SemanticOp
    model: str
    place: str
    tokens: int
    rank: int
    sizes: dict[str, int]
    build: Callable[[Randn, torch.dtype], Arguments]
    wanted: tuple[str, ...]

    def __str__(self) -> str:
        rank = f", r={self.rank}" if self.rank else ""
        return f"{self.op.name} ({self.model}, {self.place}, {self.tokens} tokens{rank})"

    def arguments(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Arguments:
        """Random arguments, with gradients required where they are wanted."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        return self.made_of(randn, dtype)

    def made_of(self, randn: Randn, dtype: torch.dtype) -> Arguments:
        """Arguments of the tensors that `randn` makes."""
        arguments = self.build(randn, dtype)
        complete = dict(zip((a.name for a in self.op.arguments), self.op.order(arguments), strict=False))
        return {name: _requiring(value, name in self.wanted) for name, value in complete.items()}

    @property
    def directions(self) -> list[str]:
        """The passes to time; where the forward makes the gradients, they are one."""
        if self.op.policy.grads_in_forward:
            return ["both"]
        return ["forward", "backward"] if self.wanted else ["forward"]

    def work(self, direction: str, dtype: torch.dtype) -> tuple[float, float]:
        """Floating-point operations and bytes of the "forward", the "backward" or "both", by the op's own formulas."""
        assert self.op.cost is not None
        sizes = {**self.sizes, "b": dtype.itemsize, "w": dtype.itemsize, "p": 4}
        passes = ("forward", "backward") if direction == "both" else (direction,)
        flops, moved = zip(*(getattr(self.op.cost, name).at(sizes) for name in passes), strict=True)
        return sum(flops), sum(moved)


def _requiring(value: Any, wanted: bool) -> Any:
    if isinstance(value, list):
        return [_requiring(v, wanted) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.requires_grad_(wanted)
    return value


def cases(shape: Shape, tokens: int, ranks: list[int]) -> Iterator[Case]:
    """Every op at every place of a model."""
    yield from _norms(shape, tokens)
    if shape.norm == "rms":
        yield from _rotary(shape, tokens)
        yield from _glu(shape, tokens)
    for rank in ranks:
        yield from _projections(shape, tokens, rank)
    yield from _losses(shape, tokens)
    yield _quantised(shape, tokens)


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
    """One adapted layer; B is not zero, as it is not after the first step."""
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

    wanted = ("x", *(f"{layer}_{name}" for layer in layers for name in ("lora_a", "lora_b")))
    return Case(ops.lora_mlp, shape.name, "MLP", T, R, {"T": T, "H": hidden, "I": inner, "R": R}, build, wanted)


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

    for place, wanted in (("frozen head", ("x",)), ("trained head", ("x", "weight"))):
        sizes = {"T": T, "H": H, "V": V, "S": int("weight" in wanted)}
        yield Case(ops.linear_cross_entropy, shape.name, place, T, 0, sizes, build, wanted)


def _quantised(shape: Shape, T: int) -> Case:
    """A weight in NF4 with double quantisation; tokens do not matter to it."""
    N, K, block, nested_block = shape.intermediate, shape.hidden, 64, 256

    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        device = randn(1).device

        def stored(n: int) -> torch.Tensor:
            return torch.randint(256, (n,), dtype=torch.uint8, device=device)

        return {
            "packed": stored(N * K // 2),
            "absmax": stored(N * K // block),
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
