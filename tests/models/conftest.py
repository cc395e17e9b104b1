"""One thread: these models are so small that a team of threads only waits for itself."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)
