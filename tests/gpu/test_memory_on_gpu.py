"""What the engine takes of a GPU's memory, says about it and gives back.

These read how much of the whole device is free: nothing else may run there meanwhile.
"""

from __future__ import annotations

import gc
import re

import pytest
import torch

from tests.gpu.test_engine_on_gpu import generate
from tests.worker.driver import make_hf_model
from vllm.errors import CapacityError, VLLMError

pytestmark = pytest.mark.gpu

MIB = 1 << 20
POOL = 1024 * MIB


@pytest.fixture(scope="module")
def heavy_model(tmp_path_factory):
    """181 MiB of float32 weights."""
    folder = tmp_path_factory.mktemp("gpu-heavy")
    make_hf_model(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.05,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def free() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_the_cache_announced_is_the_cache_there_is(start) -> None:
    llm = start(kv_cache_memory_bytes=None, gpu_memory_utilization=0.3)
    facts = llm.llm_engine.client.facts
    total = torch.cuda.get_device_properties(0).total_memory
    left, _ = torch.cuda.mem_get_info()
    assert facts.kv_cache_memory_bytes <= torch.cuda.memory_allocated()
    assert 0.2 * total < facts.kv_cache_memory_bytes < 0.3 * total
    assert total - left <= 0.3 * total


def test_too_little_memory_is_told_with_a_setting_that_starts(start) -> None:
    with pytest.raises(CapacityError, match="--gpu-memory-utilization") as failure:
        start(kv_cache_memory_bytes=None, gpu_memory_utilization=0.01)
    least = float(str(failure.value).rpartition("at least ")[2])
    start(kv_cache_memory_bytes=None, gpu_memory_utilization=least)


def test_too_large_a_cache_is_told_with_a_size_that_starts(start, prompts, greedy) -> None:
    with pytest.raises(CapacityError, match="--kv-cache-memory-bytes") as failure:
        start(kv_cache_memory_bytes=1 << 40)
    most = int(re.search(r"at most (\d+)$", str(failure.value)).group(1))
    gc.collect()
    llm = start(kv_cache_memory_bytes=most)
    assert generate(llm, prompts) == greedy


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_pool_and_weights_and_waking_restores_them(
    start, heavy_model, prompts, level
) -> None:
    llm = start(
        model=heavy_model, kv_cache_memory_bytes=POOL, enable_sleep_mode=True,
        enable_prefix_caching=True,
    )  # fmt: skip
    expected = generate(llm, prompts)
    for _ in range(2):
        awake = free()
        llm.sleep(level=level)
        assert llm.is_sleeping()
        asleep = free()
        # Kernels' own memory and the graphs' stay.
        assert asleep - awake > POOL + 175 * MIB
        with pytest.raises(VLLMError, match=r"call wake_up\(\) first"):
            generate(llm, prompts)
        llm.wake_up(tags=["weights"])
        assert llm.is_sleeping()
        assert 150 * MIB < asleep - free() < 512 * MIB
        llm.wake_up(tags=["kv_cache"])
        assert not llm.is_sleeping()
        assert abs(free() - awake) < 64 * MIB
        hits = cached_tokens(llm)
        assert generate(llm, prompts[:1]) == expected[:1]
        assert cached_tokens(llm) == hits, "a prefix was found that had been forgotten"
        assert generate(llm, prompts) == expected


def cached_tokens(llm) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")


def test_an_engine_that_may_sleep_leaves_nothing_behind(start, heavy_model, prompts) -> None:
    left = []
    for _ in range(2):
        llm = start(model=heavy_model, kv_cache_memory_bytes=POOL, enable_sleep_mode=True)
        generate(llm, prompts[:2])
        awake = free()
        llm.shutdown()
        del llm
        start.forget()
        left.append(free())
        assert left[-1] - awake > POOL + 175 * MIB
    # Kernels' own memory, which the first one has left, stays.
    assert abs(left[1] - left[0]) < 64 * MIB
