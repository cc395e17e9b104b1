"""One allocation, views in it, and no memory until it is used."""

import subprocess
import sys

import pytest
import torch

from tests.kv_cache.helpers import full, make_config, mamba, placed, sliding
from vllm.errors import CapacityError
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.planner import plan_kv_cache
from vllm.v1.kv_cache.views import shares_storage, split_kv, state_views
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout


@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_every_layer_has_a_view_of_the_one_backing(layout):
    groups = [{"l.0": full(), "l.1": full()}, {"l.2": sliding(), "l.3": sliding()}]
    cache = allocate_kv_cache(placed(groups, layout, 5))
    assert set(cache) == {"l.0", "l.1", "l.2", "l.3"}
    for view in cache.values():
        assert view.shape == (5, 2, 16, 8)
        assert view.dtype is torch.float32
    assert shares_storage([cache.backing, *cache.values()])


def test_all_kinds_in_one_model():
    """Attention with K and V of different width, a latent and a state, from plan to numbers."""
    latent = MLAAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=24, dtype="bfloat16", layer_name="l.2"
    )
    specs = {"l.0": full(2, 4, head_size_v=2), "l.1": sliding(3, 4), "l.2": latent, "l.3": mamba()}
    config = plan_kv_cache(make_config(max_model_len=256), specs, 1 << 20)
    cache = allocate_kv_cache(config)
    key, value = split_kv(cache["l.0"], 4, 2)
    assert (key.shape[1:], value.shape[1:]) == ((16, 2, 4), (16, 2, 2))
    assert cache["l.2"].shape[1:] == (1, 16, 24)
    assert cache["l.2"].dtype is torch.bfloat16
    assert cache["l.3"].shape[1:] == (1, 1, 80)
    conv, ssm = state_views(cache["l.3"], ((3, 8), (2, 4)), ("bfloat16", "float32"))
    blocks = {name: i + 1 for i, name in enumerate(specs)}
    key[blocks["l.0"]] = 1.0
    value[blocks["l.0"]] = 2.0
    cache["l.1"][blocks["l.1"]] = 3.0
    cache["l.2"][blocks["l.2"]] = 4.0
    conv[blocks["l.3"]] = 5.0
    ssm[blocks["l.3"]] = 6.0
    assert (key[blocks["l.0"]] == 1).all()
    assert (value[blocks["l.0"]] == 2).all()
    assert (cache["l.1"][blocks["l.1"]] == 3).all()
    assert (cache["l.2"][blocks["l.2"]] == 4).all()
    assert (conv[blocks["l.3"]] == 5).all()
    assert (ssm[blocks["l.3"]] == 6).all()


def test_kernel_blocks_are_counted_at_dim_0():
    config = placed([{"l.0": full(block_size=64)}], KVCacheLayout.LBHNC, 3, (16,))
    assert allocate_kv_cache(config)["l.0"].shape == (12, 2, 16, 8)


def test_an_alias_is_the_same_tensor():
    cache = allocate_kv_cache(placed([{"l.0": full()}], KVCacheLayout.LBHNC, 3))
    cache.alias("l.1", "l.0")
    assert cache["l.1"] is cache["l.0"]


def test_a_model_without_caches():
    assert allocate_kv_cache(KVCacheConfig(1, [], [])) == {}


def test_more_memory_than_there_is_names_the_option():
    config = placed([{"l.0": full()}], KVCacheLayout.LBHNC, 3)
    tensor = config.kv_cache_tensors[0]
    huge = KVCacheTensor(
        size=1 << 60,
        layers=tensor.layers,
        layer_stride=tensor.layer_stride,
        block_stride=tensor.block_stride,
    )
    config = KVCacheConfig(config.num_blocks, [huge], config.kv_cache_groups)
    with pytest.raises(CapacityError, match="--kv-cache-memory-bytes"):
        allocate_kv_cache(config)


def test_four_gib_cost_nothing_until_written():
    code = """
import resource, torch
from tests.kv_cache.helpers import full, make_config
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.planner import plan_kv_cache
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
specs = {f"l.{i}": full(8, 128, dtype="bfloat16") for i in range(32)}
config = plan_kv_cache(make_config(), specs, 4 << 30)
before = peak()
cache = allocate_kv_cache(config)
cache["l.3"][7] = 1.0
print(config.backing_size_bytes, peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, grown_kib = map(int, ran.stdout.split())
    assert size > (4 << 30) - (4 << 20)
    assert grown_kib < 32 * 1024
