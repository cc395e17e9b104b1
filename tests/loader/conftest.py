"""The default model's GGUF file; one thread for the tiny ones."""

from pathlib import Path

import pytest
import torch

from vllm.errors import ConfigError
from vllm.transformers_utils.model_path import resolve_model_path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    try:
        return resolve_model_path("smollm2")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The models are so small that a team of threads only waits for itself."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)
