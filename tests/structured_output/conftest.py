"""The default model's tokenizer, and a manager over it."""

import threading

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


@pytest.fixture(autouse=True)
def given_up_threads_end():
    """A thread that comes out of C++ code while Python ends aborts the process."""
    yield
    for thread in threading.enumerate():
        if thread.name.endswith("(given up)"):
            thread.join(timeout=600)
            assert not thread.is_alive()
