"""Engines over tiny models, with a connector, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.conftest import ENGINE_ARGS, tiny_model  # noqa: F401
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if TYPE_CHECKING:
    from tests.kv_transfer.harness import Fleet


@pytest.fixture(autouse=True, scope="package")
def environment() -> Iterator[None]:
    """Engines check their block pool whenever they are idle; UCX stays on this host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_KV_CACHE_DEBUG", "1")
        patch.setenv("UCX_NET_DEVICES", "lo")
        patch.setenv("NIXL_LOG_LEVEL", "ERROR")
        yield


@pytest.fixture
def make_llm(tiny_model, monkeypatch) -> Iterator[Callable[..., LLM]]:  # noqa: F811
    """Engines in this process, ended with the test."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    made: list[LLM] = []

    def make(**kwargs: Any) -> LLM:
        made.append(LLM(str(tiny_model), **{**ENGINE_ARGS, "block_size": 16, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


def prompt_of(length: int, seed: int = 0) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=[4 + (i * 7 + seed * 31) % 500 for i in range(length)])


def greedy(llm: LLM, prompts: list[TokensPrompt], count: int = 8, **extra: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **extra)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def cached(llm: LLM, prompt: TokensPrompt) -> int:
    """How many tokens of ``prompt`` were not computed."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return output.num_cached_tokens


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Servers as processes, shared by all tests that leave them as they were."""
    from tests.kv_transfer.harness import Fleet

    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def mooncake_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Servers in a network of their own, as long as a module's tests run."""
    from tests.kv_transfer.harness import Fleet
    from tests.kv_transfer.mooncake import own_network, require_mooncake

    require_mooncake()
    with pytest.MonkeyPatch.context() as patch, own_network():
        patch.setenv("GLOG_minloglevel", "2")
        made = Fleet(tmp_path_factory.mktemp("mooncake"))
        try:
            yield made
        finally:
            made.close()
