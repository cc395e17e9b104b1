"""How many blocks there are, and what is said when that is too few."""

import pickle
from dataclasses import replace

import pytest

from tests.kv_cache.helpers import full, make_config, mamba, sliding
from tests.kv_cache.test_grouping import hybrid
from vllm.config import DeviceConfig
from vllm.errors import CapacityError, ConfigError
from vllm.v1.kv_cache.planner import get_kv_cache_configs, plan_kv_cache
from vllm.v1.kv_cache.resolver import BackendConstraints
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

UNIFORM = {f"l.{i}": full() for i in range(4)}
BLOCK = 4 * 1024
KIB = 1024


def test_the_pool_is_what_memory_allows():
    config = plan_kv_cache(make_config(max_model_len=256), UNIFORM, 100 * BLOCK + 17)
    assert config.num_blocks == 100
    assert config.bytes_per_block == BLOCK
    assert config.backing_size_bytes == 100 * BLOCK
    assert [group.layer_names for group in config.kv_cache_groups] == [list(UNIFORM)]
    assert config.hash_block_size == 16


def test_the_override_is_taken():
    config = plan_kv_cache(
        make_config(max_model_len=256, num_gpu_blocks_override=30), UNIFORM, 100 * BLOCK
    )
    assert config.num_blocks == 30


def test_an_override_beyond_memory_is_refused():
    with pytest.raises(CapacityError, match=r"override asks for 200 blocks.*for 100"):
        plan_kv_cache(
            make_config(max_model_len=256, num_gpu_blocks_override=200), UNIFORM, 100 * BLOCK
        )


def test_a_context_that_does_not_fit_names_what_fits():
    with pytest.raises(CapacityError) as info:
        plan_kv_cache(make_config(max_model_len=4096), UNIFORM, 100 * BLOCK)
    text = str(info.value)
    assert "--max-model-len 4096 needs 257 cache blocks" in text
    assert "lower --max-model-len to at most 1584" in text
    assert f"raise --kv-cache-memory-bytes to {257 * 4096}" in text
    plan_kv_cache(make_config(max_model_len=1584), UNIFORM, 100 * BLOCK)
    plan_kv_cache(make_config(max_model_len=4096), UNIFORM, 257 * BLOCK)


def test_the_options_named_are_those_of_the_device():
    gpu = DeviceConfig(device_type="cuda")
    config = replace(make_config(max_model_len=4096), device_config=gpu)
    with pytest.raises(
        CapacityError, match=r"-memory-bytes to 1052672, or raise --gpu-memory-utilization"
    ):
        plan_kv_cache(config, UNIFORM, 100 * BLOCK)


def test_a_pool_without_room_for_anything_offers_no_length():
    with pytest.raises(CapacityError) as info:
        plan_kv_cache(make_config(max_model_len=16), UNIFORM, BLOCK)
    assert "at most" not in str(info.value)


def test_the_smallest_worker_decides_for_all():
    configs = get_kv_cache_configs(
        make_config(max_model_len=256), [UNIFORM, UNIFORM], [100 * BLOCK, 60 * BLOCK]
    )
    assert [config.num_blocks for config in configs] == [60, 60]


def test_pipeline_stages_share_groups_and_have_their_own_bytes():
    first = {f"l.{i}": spec for i, spec in enumerate([sliding(), full(), sliding()])}
    second = {f"l.{i + 3}": spec for i, spec in enumerate([full(), sliding()])}
    one, two = get_kv_cache_configs(
        make_config(max_model_len=512), [first, second], [400 * KIB, 400 * KIB]
    )
    assert one.num_blocks == two.num_blocks
    assert one.kv_cache_layout is two.kv_cache_layout
    assert len(one.kv_cache_groups) == len(two.kv_cache_groups)
    for mine, other in zip(one.kv_cache_groups, two.kv_cache_groups, strict=True):
        assert mine.kv_cache_spec == other.kv_cache_spec
    assert {n for g in one.kv_cache_groups for n in g.layer_names} == set(first)
    assert {n for g in two.kv_cache_groups for n in g.layer_names} == set(second)


def test_workers_that_disagree_are_refused():
    with pytest.raises(ConfigError, match=r"worker 1 declares other kv cache specs for layer l\.0"):
        get_kv_cache_configs(make_config(), [{"l.0": full()}, {"l.0": full(4)}], [KIB, KIB])
    limits = [{"l.0": BackendConstraints(backend=name)} for name in "AB"]
    with pytest.raises(ConfigError, match=r"other backends for layer l\.0"):
        get_kv_cache_configs(make_config(), [{"l.0": full()}] * 2, [KIB, KIB], limits)


def test_layers_that_keep_nothing_need_nothing():
    encoder = EncoderOnlyAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype="int8")
    config = plan_kv_cache(make_config(), {"l.0": encoder}, 0)
    assert (config.num_blocks, config.kv_cache_groups, config.backing_size_bytes) == (1, [], 0)
    config = plan_kv_cache(make_config(max_model_len=64), {**UNIFORM, "e": encoder}, 100 * BLOCK)
    assert [group.layer_names for group in config.kv_cache_groups] == [list(UNIFORM)]


def test_a_groups_layers_may_store_different_pages():
    specs = hybrid(6, 3, full(8), full(2))
    config = plan_kv_cache(make_config(max_model_len=64), specs, 100 * KIB * KIB)
    assert {name: config.layer_spec(name) for name in specs} == specs
    assert config.layer_spec("l.2").page_size_bytes == 4 * config.layer_spec("l.0").page_size_bytes
    with pytest.raises(KeyError):
        config.group_of("nothing")


def test_hashes_cover_what_divides_every_groups_blocks():
    specs = {"l.0": full(block_size=32), "l.1": sliding(block_size=48)}
    config = plan_kv_cache(
        make_config(max_model_len=512, user_specified_block_size=True), specs, 10 * KIB * KIB
    )
    assert config.hash_block_size == 16
    assert config.cache_hit_alignment_tokens == 96
    off = make_config(max_model_len=512, enable_prefix_caching=False)
    assert plan_kv_cache(off, specs, 10 * KIB * KIB).hash_block_size is None


def test_what_the_pool_must_do_with_new_blocks():
    plain = plan_kv_cache(make_config(max_model_len=64), UNIFORM, 100 * BLOCK)
    assert not plain.needs_kv_cache_zeroing
    states = plan_kv_cache(make_config(max_model_len=64), {"l.0": mamba()}, 100 * BLOCK)
    assert states.has_mamba_layers
    assert states.needs_kv_cache_zeroing
    mixed = {"l.0": full(), "l.1": full(dtype="bfloat16")}
    config = plan_kv_cache(make_config(max_model_len=64), mixed, 100 * BLOCK)
    assert config.has_mixed_precision_kv_cache
    assert config.needs_kv_cache_zeroing


def test_block_strides_obey_what_a_spec_demands():
    specs = {
        "l.0": full(1, 3, 1, "int8", block_stride_alignment=576),
        "l.1": full(1, 5, 1, "int8"),
    }
    config = make_config(max_model_len=4, kv_cache_layout="BLHNC")
    planned = plan_kv_cache(config, specs, 100 * KIB)
    assert {tensor.block_stride for tensor in planned.kv_cache_tensors} == {576}


def test_the_plan_travels_between_processes():
    config = plan_kv_cache(make_config(max_model_len=256), UNIFORM, 100 * BLOCK)
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.explanation.explain() == config.explanation.explain()


def test_turning_the_hybrid_manager_off_makes_one_group():
    config = plan_kv_cache(
        make_config(max_model_len=64, disable_hybrid_kv_cache_manager=True),
        hybrid(6, 3, full(), sliding()),
        100 * KIB * KIB,
    )
    assert len(config.kv_cache_groups) == 1
    assert config.kv_cache_layout is KVCacheLayout.LBHNC
