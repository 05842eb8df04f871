"""What every test starts from."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions are defined then


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No compiled code of an earlier test, and one thread: the tests run side by side."""
    torch._dynamo.reset()
    torch.set_autocast_enabled("cpu", False)  # tracing that fails inside an autocast region may leave it on
    torch.set_num_threads(1)
