"""Cases of ops with dropout, for the scripts that cover all kernels: the benchmarks' cases have no dropout."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlora.kernels import ops
from fastlora.tools.bench.cases import Arguments, Case, Randn


def dropout_cases() -> Iterator[Case]:
    """Yield cases with few and many rows, also with rows whose length is not a multiple of four."""
    for T, H in ((300, 1024), (8192, 1024), (300, 63)):
        yield _dropout(T, H, added=False)
        yield _dropout(T, H, added=True)
        yield _norm(T, H, layer=True)
        yield _norm(T, H, layer=False)


def _seed(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=like.device)


def _dropout(T: int, H: int, added: bool) -> Case:
    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        x = randn(T, H)
        return {"x": x, "base": randn(T, H) if added else None, "seed": _seed(x), "p": 0.1, "out_dtype": dtype}

    return Case(ops.dropout, "any", "dropout", T, 0, {"T": T, "K": H}, build, ("x",))


def _norm(T: int, H: int, layer: bool) -> Case:
    def build(randn: Randn, dtype: torch.dtype) -> Arguments:
        x, weight = randn(T, H), randn(H)
        given = {"residual": randn(T, H), "x": x, "weight": weight, "seed": _seed(x), "dropout": 0.1, "eps": 1e-5}
        if layer:
            return {**given, "bias": randn(H), "out_dtype": dtype}
        rounded = dict.fromkeys(("norm_dtype", "scale_dtype", "out_dtype"), dtype)
        return {**given, "offset": 0.0, "compute_dtype": torch.float32, **rounded}

    op = ops.add_layer_norm if layer else ops.add_rms_norm
    return Case(op, "any", "residual + dropout + norm", T, 0, {"T": T, "H": H, "S": 1}, build, ("x", "residual"))
