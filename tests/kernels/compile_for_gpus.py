"""Compiles every kernel that the ops launch for absent GPUs: `compile_for_gpus.py CAPABILITY...`, e.g. 90.

The ops run on meta tensors, whose device is assumed to have the capability, and launches are recorded instead of made;
each different launch is then compiled. Prints registers, local memory (spills) and shared memory of each kernel, and
exits with 1 if a kernel does not compile, does not fit, or spills.

Of several capabilities, and of float16 and bfloat16, each kernel is compiled for a random one, and has to fit all GPUs
on which it is launched. Kernels with matrix products are compiled for one capability of each generation, since their
instructions differ; other kernels differ only in the last compilation step.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from dropout_cases import dropout_cases
from op_cases import require_every_gradient
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastlora.kernels.core import devices, implementations
from fastlora.kernels.core.execution import Call, run_on_meta
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.ops import dequantize_4bit
from fastlora.kernels.triton.blocks import gemv_4bit, matmul
from fastlora.kernels.triton.host import precompile
from fastlora.tools.bench.cases import Case, cases
from fastlora.tools.bench.shapes import SHAPES

SHARED_MEMORY = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that one program can use, by compute capability."""

PROCESSORS = 132

HALF = re.compile(r"\b(bf|fp)16\b")
"""The types of 16 bits, which differ by the instructions that convert and multiply them."""

PRODUCT = "tt.dot"
"""The operation of matrix products in Triton's IR, which is compiled to other instructions for each generation."""

CACHE_HINT = "READ"
"""The parameter for the eviction policy of loads, which changes neither registers nor memory of a kernel."""


def launches(capability: int) -> list[precompile.RecordedLaunch]:
    """Return what the ops of a large and of a small model launch in training, for one token and for many."""
    devices.set_meta_gpu(devices.Gpu(divmod(capability, 10), PROCESSORS))
    with (
        patch.object(matmul, "serves", matmul.supports),  # also where cuBLAS is faster
        implementations.only("triton"),
        implementations.for_precompilation(),
        precompile.recorded() as recorded,
    ):
        for dtype in [torch.float16, *([torch.bfloat16] if capability >= 80 else []), torch.float32]:
            for case in _cases():
                if case.op.implementations.accelerated:
                    _run(case, dtype)
            _multiply_by_four_bits(dtype)
    return recorded


def _cases() -> Iterator[Case]:
    for name in ("Qwen3-0.6B", "Gemma-2-9B", "BERT-large"):
        for tokens in (1, 300, 8192):
            yield from cases(SHAPES[name], tokens, [8, 64])
    yield from dropout_cases()


def _run(case: Case, dtype: torch.dtype) -> None:
    """Run forward and backward on meta tensors, with all gradients and with those of LoRA."""

    def empty(*shape: int, dtype: torch.dtype = dtype, **_: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments = case.arguments_from(empty, dtype)
    for everything in (False, True):
        if everything and case.grad_arguments:
            require_every_gradient(arguments)
        values = case.op.order(arguments)
        run_on_meta(Call(case.op, values, [t is not None and t.requires_grad for t in case.op.leaves.flat(values)]))


def _multiply_by_four_bits(dtype: torch.dtype) -> None:
    """Run products of few rows with 4-bit weights, on GPUs that have a kernel for them."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    N, K, R = 14336, 4096, 16
    packed, blocks = empty(N * K // 2, 1, dtype=torch.uint8), N * K // 64
    plain = (packed, empty(blocks, dtype=torch.float32), None, None, None)
    twice = (
        packed,
        empty(blocks, dtype=torch.uint8),
        *(empty(n, dtype=torch.float32) for n in (blocks // 256, 256, 1)),
    )
    for scales in (plain, twice):
        weight = QuantizedWeight(dequantize_4bit, (*scales, 64, 256, "nf4", N, K, dtype))
        for T in (1, 16, 64):
            x, low = empty(T, K), (empty(T, R), empty(N, R).t())
            if gemv_4bit.serves(weight, x, low, None):
                gemv_4bit.product(x, weight, low, empty(N), dtype)


def compiled(made: precompile.RecordedLaunch, capability: int) -> tuple[str, Any]:
    """Return the kernel's name and specialization, and the compiled kernel."""
    function, args, kwargs = made
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(function.signature, function.params, backend)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
    names = [param.name for param in function.params]
    shown = {names[index]: value for (index, *_), value in constants.items() if names[index] != CACHE_HINT}
    return f"{function.fn.__name__} {signature} {shown} {options.num_warps}", lambda: triton.compile(
        ASTSource(function, signature, constants, attributes), target=target, options=options.__dict__
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers, and the bytes of local memory, per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = [int(n) for name in ("REG", "STACK") for n in re.findall(rf"{name}:(\d+)", text)]
    return found[0], found[1]


@dataclass
class Kernel:
    """A kernel that is launched with one specialization, on one or more GPUs."""

    key: str
    compilers: dict[tuple[int, str], Callable[[], Any]]
    """What compiles it, by compute capability and full name."""

    def check(self) -> Iterator[tuple[bool, str]]:
        """Compile for as many GPUs as it takes, and return whether each result is good, and its description."""
        chosen = random.Random(self.key).choice(list(self.compilers))
        good, text, has_products = self._compile(chosen, list(self.compilers))
        yield good, text
        others = self._by_generation() if has_products else {}
        for generation, names in others.items():
            if generation != chosen[0] // 10:
                yield self._compile(random.Random(self.key).choice(names), names)[:2]

    def _by_generation(self) -> dict[int, list[tuple[int, str]]]:
        names = dict[int, list[tuple[int, str]]]()
        for capability, name in self.compilers:
            names.setdefault(capability // 10, []).append((capability, name))
        return names

    def _compile(self, chosen: tuple[int, str], served: list[tuple[int, str]]) -> tuple[bool, str, bool]:
        """Return whether it fits all GPUs in `served` without spills, the line to print, and whether it multiplies."""
        capability, name = chosen
        try:
            kernel = self.compilers[chosen]()
            registers, local = usage(kernel.asm["cubin"])
        except Exception as problem:
            return False, f"sm_{capability} {name}: {type(problem).__name__}: {str(problem)[-500:]}", True
        shared = kernel.metadata.shared
        good = local == 0 and shared <= min(SHARED_MEMORY[each] for each, _ in served) * 1024
        used = f"sm_{capability}, {registers} registers, {local} B local, {shared} B shared"
        return good, f"{used}: {name}", PRODUCT in kernel.asm["ttir"]


def main(*capabilities: int) -> int:
    kernels = dict[str, Kernel]()
    for capability in capabilities:
        for made in launches(capability):
            name, compile_ = compiled(made, capability)
            key = HALF.sub("16 bits", name)
            kernels.setdefault(key, Kernel(key, {})).compilers[capability, name] = compile_
    results = []
    for kernel in kernels.values():
        for good, text in kernel.check():
            print(f"{'ok    ' if good else 'FAILED'} {text}")
            results.append(good)
    failed = results.count(False)
    print(f"{', '.join(f'sm_{each}' for each in capabilities)}: {len(results)} kernels, {failed} failed")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
