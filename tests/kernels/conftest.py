"""Runs the tests of an op with each of its implementations: natively on a GPU, otherwise in Triton's interpreter."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import interpreter
from lora_cases import Scheme, served

from fastlora.kernels.core import implementations

if not torch.cuda.is_available():
    interpreter.speed_up()

hypothesis.settings.register_profile("ops", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ops")

PYTORCH_ONLY = {
    "pytorch_only": "the test is only about the PyTorch implementation",
    "float64": "the test computes in float64, which kernels do not",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in PYTORCH_ONLY.items():  # here, for runs without the repository's settings
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        names = getattr(metafunc.module, "IMPLEMENTATIONS", ["pytorch"])
        is_pytorch_only = any(metafunc.definition.get_closest_marker(name) for name in PYTORCH_ONLY)
        metafunc.parametrize("implementation", ["pytorch"] if is_pytorch_only else names, indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    parameters = request.node.callspec.params
    interpreted = request.param == "triton" and not torch.cuda.is_available()
    if interpreted and torch.bfloat16 in parameters.values():
        pytest.skip("Triton's interpreter has no bfloat16 arithmetic")
    with implementations.only(request.param):
        if not all(served(p) for p in parameters.values() if isinstance(p, Scheme)):
            pytest.skip("the implementation does not support these dtypes")
        yield request.param
