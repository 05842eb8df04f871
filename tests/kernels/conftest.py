"""Runs the tests of an op on each of its forms: natively on a GPU, and else in Triton's interpreter."""

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
    interpreter.hasten()

hypothesis.settings.register_profile("ops", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ops")

PYTORCH_ONLY = {
    "pytorch_form": "the test is about the PyTorch form alone",
    "float64": "the test computes in float64, which kernels do not",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in PYTORCH_ONLY.items():  # here, and so for whoever runs these tests with settings of his own
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "form" in metafunc.fixturenames:
        forms = getattr(metafunc.module, "FORMS", ["pytorch"])
        pytorch_only = any(metafunc.definition.get_closest_marker(name) for name in PYTORCH_ONLY)
        metafunc.parametrize("form", ["pytorch"] if pytorch_only else forms, indirect=True)


@pytest.fixture(autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    parameters = request.node.callspec.params
    interpreted = request.param == "triton" and not torch.cuda.is_available()
    if interpreted and torch.bfloat16 in parameters.values():
        pytest.skip("Triton's interpreter has no bfloat16 arithmetic")
    with implementations.only(request.param):
        if not all(served(p) for p in parameters.values() if isinstance(p, Scheme)):
            pytest.skip("the form does not compute with these dtypes")
        yield request.param
