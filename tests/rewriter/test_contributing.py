"""Extensions take few edits: a new spelling one line in one file, a new gated activation one place in each of four
files.

Both are done on a copy of the package, with the lines that a contributor would write.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"": "rewriter", "kernels": "kernels", "patterns": "patterns", "tools": "tools"}

NEW_SPELLING = {
    "rewriter/graph/canonical_ops.py": [
        (
            '\ncanonical("silu", "input", call("input inplace=False", F.silu), fresh=True)\n',
            '\ncanonical("silu", "input", call("input inplace=False", F.silu), "lib.swish", fresh=True)\n',
        )
    ]
}
"""An operator of a library that is not installed where fastlora is imported."""

MISH_GATE = {
    "rewriter/graph/canonical_ops.py": [
        (
            'canonical("gelu_tanh", "input")\n',
            'canonical("gelu_tanh", "input")\n'
            'canonical("mish", "input", call("input inplace=False", F.mish), fresh=True)\n',
        )
    ],
    "kernels/formulas/glu.py": [
        (
            "Elementwise = Callable",
            "def _mish_slope(z: torch.Tensor) -> torch.Tensor:\n"
            "    t = torch.tanh(F.softplus(z))\n"
            "    return t + z * torch.sigmoid(z) * (1 - t * t)\n\n\n"
            "Elementwise = Callable",
        ),
        (
            '    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),\n',
            '    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),\n    "mish": (F.mish, _mish_slope),\n',
        ),
    ],
    "kernels/triton/glu.py": [
        ('ACTIVATIONS = ("silu", "gelu", "gelu_tanh")', 'ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "mish")'),
        (
            "    else:\n        cdf, density = _sigmoid(z)\n",
            '    elif ACTIVATION == "mish":\n'
            "        grown = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))  # softplus\n"
            "        cdf = 2.0 / (1.0 + tl.exp(-2.0 * grown)) - 1.0\n"
            "        slope = cdf + z / (1.0 + tl.exp(-z)) * (1.0 - cdf * cdf)\n"
            "    else:\n        cdf, density = _sigmoid(z)\n",
        ),
    ],
    "patterns/mlp.py": [
        ("gelu_tanh, raised", "gelu_tanh, mish, raised"),
        ('    "gelu_tanh": gelu_tanh,\n', '    "gelu_tanh": gelu_tanh,\n    "mish": mish,\n'),
    ],
}

TRY_SPELLING = """
import torch
import torch.nn.functional as F
from graphs import analyse, randn

library = torch.library.Library("lib", "DEF")
library.define("swish(Tensor x) -> Tensor")
library.impl("swish", F.silu, "CompositeImplicitAutograd")
outcome = analyse(lambda gate, up: torch.ops.lib.swish(gate) * up, randn(2, 3, 8), randn(2, 3, 8, seed=1))
assert outcome.ops == ["glu"], outcome.missed()
outcome.assert_close()
"""

TRY_MISH = """
import torch.nn.functional as F
from graphs import analyse, lora, randn

gate, up = randn(2, 3, 8), randn(2, 3, 8, seed=1)
outcome = analyse(lambda gate, up: F.mish(gate) * up, gate, up, verify=True)
assert outcome.ops == ["glu"], outcome.missed() + outcome.turned_down()
assert not outcome.misses
outcome.assert_close()

layers = [randn(8, 8, grad=False), randn(2, 8), randn(8, 2)] * 3
mlp = lambda x, *p: lora(F.mish(lora(x, *p[:3])) * lora(x, *p[3:6]), *p[6:])
outcome = analyse(mlp, gate, *layers)
assert outcome.ops == ["lora_mlp"], outcome.missed() + outcome.turned_down()
outcome.assert_close()

outcome = analyse(lambda gate, up: F.mish(gate, inplace=True) * up, gate.detach(), up)
assert not outcome.ops
outcome.assert_identical()
"""

TRY_KERNEL = """
import torch
from fastlora.kernels.formulas import glu as formulas
from fastlora.kernels.triton import glu as kernels

gate, up, dy = (torch.randn(3, 40, generator=torch.Generator().manual_seed(i)) * 3 for i in range(3))
y, dgate, dup = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
kernels.run_forward(gate, up, "mish", y)
kernels.run_backward(dy, gate, up, "mish", dgate, dup)
leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
expected = formulas.reference(*leaves, "mish", torch.float64)
gradients = torch.autograd.grad(expected, leaves, dy.double())
for mine, its in zip((y, dgate, dup), (expected.detach(), *gradients)):
    torch.testing.assert_close(mine.double(), its, rtol=1e-5, atol=1e-5)
"""


def edited(folder: Path, edits: dict[str, list[tuple[str, str]]]) -> Path:
    """Return a copy of the package with these lines added."""
    for name, source in FOLDERS.items():
        for path in (ROOT / source).rglob("*.py"):
            text = path.read_text()
            for before, after in edits.get(str(path.relative_to(ROOT)), ()):
                assert text.count(before) == 1, f"{path}: {before!r}"
                text = text.replace(before, after)
            copy = folder / "fastlora" / name / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    return folder


def run(package: Path, program: str, **environment: str) -> None:
    paths = os.pathsep.join(map(str, (package, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=package,
        env={**os.environ, **environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_spelling_is_one_line_in_one_file(tmp_path: Path) -> None:
    assert len(NEW_SPELLING) == 1
    run(edited(tmp_path, NEW_SPELLING), TRY_SPELLING)


def test_a_new_gated_activation_touches_four_files_and_a_test(tmp_path: Path) -> None:
    assert len(MISH_GATE) == 4
    run(edited(tmp_path, MISH_GATE), TRY_MISH)


def test_the_kernel_of_a_new_gated_activation_is_one_branch(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run(edited(tmp_path, MISH_GATE), TRY_KERNEL, TRITON_INTERPRET="1")
