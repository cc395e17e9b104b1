"""The default model's GGUF file, and what make_smollm2-style conversion would write from it."""

from pathlib import Path

import pytest

from vllm.errors import ConfigError
from vllm.transformers_utils.model_path import resolve_model_path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    try:
        return resolve_model_path("smollm2")
    except ConfigError as error:
        pytest.skip(str(error))
