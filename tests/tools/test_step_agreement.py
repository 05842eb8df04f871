"""When a step's gradients and loss pass for the same computation as eager's, and when not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.tools.bench.step.agreement import Truth, disagreement, errors

TRUE = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])}
LOSS, EAGER_LOSS = 2.0, 2.002


def saved(path: Path, a: float, b: float, **more: torch.Tensor) -> Path:
    """Gradients with relative errors of `a` and `b`."""
    save_file({"a": TRUE["a"] * (1 + a), "b": TRUE["b"] * (1 - b), **more}, path)
    return path


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    """Eager is off by 1% in one tensor and by 4% in the other."""
    save_file(TRUE, tmp_path / "truth")
    return Truth(
        tmp_path / "truth", LOSS, errors(saved(tmp_path / "eager", 0.01, 0.04), tmp_path / "truth"), EAGER_LOSS
    )


def test_errors_are_relative_to_the_truth(truth: Truth) -> None:
    assert truth.eager.tensors == pytest.approx({"a": 0.01, "b": 0.04}, rel=1e-4)
    assert truth.eager.step == pytest.approx(((0.05**2 + 0.04**2) / 26) ** 0.5, rel=1e-4)
    assert truth.eager.worst == "b"
    assert truth.eager_loss_error == pytest.approx(0.001)


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
def test_what_is_less_exact_than_eager_disagrees(
    tmp_path: Path, truth: Truth, a: float, b: float, loss: float, named: str | None
) -> None:
    problem = disagreement(errors(saved(tmp_path / "found", a, b), truth.path), loss, truth, 1.25)
    assert problem is None if named is None else named in str(problem)


def test_a_larger_ratio_lets_more_pass(tmp_path: Path, truth: Truth) -> None:
    found = errors(saved(tmp_path / "found", 0.03, 0.1), truth.path)
    assert disagreement(found, LOSS, truth, 1.25) is not None
    assert disagreement(found, LOSS, truth, 4.0) is None


def test_gradients_must_all_be_there(tmp_path: Path, truth: Truth) -> None:
    found = errors(saved(tmp_path / "found", 0.0, 0.0, c=torch.ones(1)), truth.path)
    assert "such as c" in str(disagreement(found, LOSS, truth, 1.25))
    save_file({"a": TRUE["a"]}, tmp_path / "found")
    assert "such as b" in str(disagreement(errors(tmp_path / "found", truth.path), LOSS, truth, 1.25))
    save_file({}, tmp_path / "found")
    assert "2 gradients" in str(disagreement(errors(tmp_path / "found", truth.path), LOSS, truth, 1.25))
