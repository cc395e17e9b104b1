"""What every test stands on."""

import importlib.util
import os

import pytest
import torch

from tests.effort import set_thorough

# Tests of kernels run where hypothesis is not installed.
if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    # A busy machine is no failure.
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    set_thorough("not slow" not in config.option.markexpr)
