"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.entrypoints.server import SMALL, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2 in float32, so that greedy text does not depend on how requests are batched."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = (
        *SMALL,
        "--dtype",
        "float32",
        "--scheduling-policy",
        "priority",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--enable-prompt-tokens-details",
        "--enable-request-id-headers",
        "--enable-tokenizer-info-endpoint",
    )
    with Server(log, *options) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client
