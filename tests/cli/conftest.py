"""Runs ``vllm`` in this process, as the command would, and keeps what it printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.cli.peer import Peer, running_peer
from vllm.entrypoints.cli.main import main


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


@pytest.fixture
def vllm_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def run(*argv: str) -> Answer:
        capsys.readouterr()
        try:
            status = main(argv)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        printed = capsys.readouterr()
        return Answer(status, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def peer_server() -> Iterator[Peer]:
    with running_peer() as peer:
        yield peer


@pytest.fixture
def peer(peer_server: Peer) -> Peer:
    """The server of all tests, as if newly started."""
    peer_server.__init__(url=peer_server.url)  # type: ignore[misc]
    return peer_server
