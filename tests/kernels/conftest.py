"""Fresh inputs for every run; a failing test shows the seed, KERNEL_TEST_SEED repeats it."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

from vllm import _custom_ops as ops


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The references are small: a thread team of torch's costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("KERNEL_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"KERNEL_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture(params=ops.supported_isas() or ["pytorch"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor in turn."""
    if request.param == "pytorch":
        yield "pytorch"
        return
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(ops.supported_isas()[0])
