"""Bringing an engine up: the engine process loads while this one resolves and tokenises."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from vllm.config import VllmConfig
from vllm.v1.engine.core_client import AsyncMPClient, InprocClient, SyncMPClient
from vllm.v1.engine.launch import EngineProcess
from vllm.v1.engine.phases import StartupPhases
from vllm.v1.engine.tokenizer import tokenizer_from_config

__all__ = ["StartedEngine", "start_in_process", "start_process"]

C = TypeVar("C", SyncMPClient, AsyncMPClient)


class StartedEngine(NamedTuple):
    """A running engine; ``tokenizer`` is None with ``--skip-tokenizer-init``."""

    vllm_config: VllmConfig
    client: Any
    tokenizer: Any


def start_process(
    make_config: Callable[[], VllmConfig],
    client_class: type[C],
    *,
    log_stats: bool,
    phases: StartupPhases,
) -> StartedEngine:
    """Start an engine process; ``make_config`` runs while it imports what it needs.

    Raises:
        VLLMValidationError, VLLMError, ValueError, OSError: why it cannot start, in the class
            that was raised there.
    """
    process = EngineProcess()
    client: C | None = None
    try:
        with phases.phase("resolving the configuration"):
            vllm_config = make_config()
        client = client_class(process)
        process.configure(vllm_config, log_stats=log_stats)
        with phases.phase("loading the tokenizer"):
            tokenizer = tokenizer_from_config(vllm_config.model_config)
        with phases.phase("waiting for the engine process"):
            client.wait_ready()
    except BaseException:
        if client is not None:
            client.shutdown(timeout=0)
        process.kill()
        raise
    return StartedEngine(vllm_config, client, tokenizer)


def start_in_process(
    make_config: Callable[[], VllmConfig], *, log_stats: bool, phases: StartupPhases
) -> StartedEngine:
    """Build the engine core in this process; raises as ``start_process`` does."""
    from vllm.platforms import current_platform

    current_platform.prepare_environment()
    with phases.phase("resolving the configuration"):
        vllm_config = make_config()
    with phases.phase("loading the tokenizer"):
        tokenizer = tokenizer_from_config(vllm_config.model_config)
    client = InprocClient(vllm_config, log_stats=log_stats, phases=phases)
    return StartedEngine(vllm_config, client, tokenizer)
