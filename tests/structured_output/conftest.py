"""The default model's tokenizer, and a manager over it."""

import pytest

from vllm.transformers_utils.config import resolve_model
from vllm.transformers_utils.tokenizer import get_tokenizer
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

VOCAB_SIZE = 49_152


@pytest.fixture(scope="session")
def tokenizer():
    return get_tokenizer(resolve_model("smollm2").model_path)


@pytest.fixture(scope="session")
def backend(tokenizer):
    return XgrammarBackend(tokenizer, VOCAB_SIZE)
