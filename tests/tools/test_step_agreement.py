"""The check of a step's loss and gradients against the float32 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.tools.bench.step.agreement import Reference, disagreement, errors

EXPECTED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])}
LOSS, EAGER_LOSS = 2.0, 2.002


def saved(path: Path, a: float, b: float, **more: torch.Tensor) -> Path:
    """Save gradients with relative errors `a` and `b`."""
    save_file({"a": EXPECTED["a"] * (1 + a), "b": EXPECTED["b"] * (1 - b), **more}, path)
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    """A reference from which eager differs by 1% in one tensor and by 4% in the other."""
    save_file(EXPECTED, tmp_path / "reference")
    path = tmp_path / "reference"
    return Reference(path, LOSS, errors(saved(tmp_path / "eager", 0.01, 0.04), path), EAGER_LOSS)


def test_errors_are_relative_to_the_reference(reference: Reference) -> None:
    assert reference.eager.tensors == pytest.approx({"a": 0.01, "b": 0.04}, rel=1e-4)
    assert reference.eager.step == pytest.approx(((0.05**2 + 0.04**2) / 26) ** 0.5, rel=1e-4)
    assert reference.eager.worst == "b"
    assert reference.eager_loss_error == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("a", "b", "loss", "named"),
    [
        (0.01, 0.04, EAGER_LOSS, None),
        (0.012, 0.04, 1.9975, None),
        (0.0, 0.0, LOSS, None),
        (0.02, 0.0, LOSS, "gradients: error"),
        (0.0, 0.06, LOSS, "gradient of b: error"),
        (0.01, 0.04, 1.98, "loss 1.980000"),
        (float("nan"), 0.0, LOSS, "gradients: error nan"),
        (0.0, 0.0, float("nan"), "loss nan"),
    ],
)
def test_steps_with_larger_errors_than_eager_fail(
    tmp_path: Path, reference: Reference, a: float, b: float, loss: float, named: str | None
) -> None:
    problem = disagreement(errors(saved(tmp_path / "found", a, b), reference.path), loss, reference, 1.25)
    assert problem is None if named is None else named in str(problem)


def test_a_larger_ratio_allows_larger_errors(tmp_path: Path, reference: Reference) -> None:
    found = errors(saved(tmp_path / "found", 0.03, 0.1), reference.path)
    assert disagreement(found, LOSS, reference, 1.25) is not None
    assert disagreement(found, LOSS, reference, 4.0) is None


def test_missing_and_unexpected_gradients_fail(tmp_path: Path, reference: Reference) -> None:
    found = errors(saved(tmp_path / "found", 0.0, 0.0, c=torch.ones(1)), reference.path)
    assert "such as c" in str(disagreement(found, LOSS, reference, 1.25))
    save_file({"a": EXPECTED["a"]}, tmp_path / "found")
    assert "such as b" in str(disagreement(errors(tmp_path / "found", reference.path), LOSS, reference, 1.25))
    save_file({}, tmp_path / "found")
    assert "2 gradients" in str(disagreement(errors(tmp_path / "found", reference.path), LOSS, reference, 1.25))
