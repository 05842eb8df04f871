"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No compiled code of an earlier test, and one thread: the tests run side by side."""
    torch._dynamo.reset()
    torch.set_num_threads(1)
