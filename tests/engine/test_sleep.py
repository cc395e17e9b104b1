"""An engine that sleeps gives its memory back, and answers as before when it wakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.engine.conftest import ENGINE_ARGS
from vllm import LLM, SamplingParams
from vllm.errors import EngineGenerateError, UnsupportedError, VLLMError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
# 200 tokens each: what they leave in the pool takes 70 MB.
PROMPTS = [{"prompt_token_ids": [100 + i, *range(1000, 1199)]} for i in range(8)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def sleeper() -> Iterator[LLM]:
    """SmolLM2 in float32: 540 MB of weights."""
    with pytest.MonkeyPatch.context() as patch:
        # The checker's copy of the pool would stay.
        patch.setenv("VLLM_KV_CACHE_DEBUG", "0")
        with LLM(
            "smollm2",
            dtype="float32",
            enable_sleep_mode=True,
            kv_cache_memory_bytes=256 * MIB,
            max_model_len=512,
        ) as llm:
            yield llm


def memory(llm: LLM) -> int:
    """Resident bytes of the engine's process."""
    return psutil.Process(llm.llm_engine.client.pid).memory_info().rss


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: LLM, state: str) -> float:
    (value,) = [
        m.value
        for m in llm.get_metrics()
        if m.name == "vllm:engine_sleep_state" and m.labels["sleep_state"] == state
    ]
    return value


def test_level_1_frees_the_pool_and_level_2_the_weights_too(sleeper: LLM):
    expected = tokens(sleeper)
    awake = memory(sleeper)
    sleeper.sleep(level=1)
    assert sleeper.is_sleeping()
    assert awake - memory(sleeper) > 50 * MIB
    assert (metric(sleeper, "awake"), metric(sleeper, "weights_offloaded")) == (0, 1)
    with pytest.raises(VLLMError, match=r"call wake_up\(\) first"):
        sleeper.generate("x", use_tqdm=False)
    sleeper.wake_up()
    assert not sleeper.is_sleeping()
    assert metric(sleeper, "awake") == 1
    hits = sum(m.value for m in sleeper.get_metrics() if m.name == "vllm:prefix_cache_hits")
    assert tokens(sleeper) == expected
    # Nothing that was cached before is found; what the prompts share cannot be: they differ first.
    assert hits == sum(m.value for m in sleeper.get_metrics() if m.name == "vllm:prefix_cache_hits")

    sleeper.sleep(level=2)
    asleep = memory(sleeper)
    assert awake - asleep > 450 * MIB
    sleeper.wake_up(tags=["weights"])
    assert sleeper.is_sleeping()
    assert memory(sleeper) - asleep > 350 * MIB
    sleeper.wake_up(tags=["kv_cache"])
    assert not sleeper.is_sleeping()
    assert tokens(sleeper) == expected
    # Loading leaves some of the heap in pieces; weights kept twice would be 540 MB.
    assert memory(sleeper) < awake + 160 * MIB


def test_sleep_goes_deeper_or_says_why_not(sleeper: LLM):
    """What answers well has given the memory back."""
    expected = tokens(sleeper)
    awake = memory(sleeper)
    sleeper.sleep(level=0)
    sleeper.sleep(level=1)
    assert awake - memory(sleeper) > 50 * MIB
    sleeper.sleep(level=0)
    assert (metric(sleeper, "awake"), metric(sleeper, "weights_offloaded")) == (0, 1)
    with pytest.raises(EngineGenerateError, match="level 1 and lacks kv_cache, scheduling, weig"):
        sleeper.sleep(level=2)
    assert metric(sleeper, "discard_all") == 0
    sleeper.wake_up(tags=["kv_cache"])
    with pytest.raises(EngineGenerateError, match="lacks scheduling, weights: call wake_up"):
        sleeper.sleep(level=1)
    sleeper.wake_up()
    assert tokens(sleeper) == expected


def test_what_cannot_be_asked_for_is_refused(sleeper: LLM, llm: LLM):
    with pytest.raises(EngineGenerateError, match="level must be 0, 1 or 2, not 3"):
        sleeper.sleep(level=3)
    with pytest.raises(EngineGenerateError, match="tags must be among weights, kv_cache"):
        sleeper.wake_up(tags=["wheights"])
    with pytest.raises(UnsupportedError, match="mode 'keep'"):
        sleeper.sleep(mode="keep")
    with pytest.raises(EngineGenerateError, match="--enable-sleep-mode"):
        llm.sleep()
    assert not sleeper.is_sleeping()
    sleeper.sleep(level=0)
    assert sleeper.is_sleeping()
    sleeper.wake_up()
    assert not sleeper.is_sleeping()


@pytest.mark.parametrize("level", [1, 2])
def test_in_debug_mode_the_pool_is_watched_again_after_waking(tiny_model: Path, level: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(str(tiny_model), **ENGINE_ARGS, enable_sleep_mode=True)
    expected = llm.generate("The quick brown fox", GREEDY, use_tqdm=False)[0].outputs[0]
    llm.sleep(level)
    llm.wake_up()
    again = llm.generate("The quick brown fox", GREEDY, use_tqdm=False)[0]
    assert again.num_cached_tokens == 0
    assert again.outputs[0].token_ids == expected.token_ids
    llm.shutdown()
