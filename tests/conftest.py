"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No compiled code of an earlier test, and one thread: the tests run side by side."""
    torch._dynamo.reset()
    torch.set_autocast_enabled("cpu", False)  # tracing that fails inside an autocast region may leave it on
    torch.set_num_threads(1)
