"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No compiled code of an earlier test, and one thread: the tests run side by side."""
    torch._dynamo.reset()
    torch.set_num_threads(1)
    yield
