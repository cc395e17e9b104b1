"""The configuration classes: frozen, and each refuses what cannot work."""

import dataclasses

import pytest

from vllm.config import (
    CacheConfig,
    KVEventsConfig,
    KVTransferConfig,
    ParallelConfig,
    SchedulerConfig,
    StructuredOutputsConfig,
    get_current_vllm_config,
    set_current_vllm_config,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.errors import ConfigError

SCHEDULER = {"max_num_batched_tokens": 2048, "max_num_seqs": 16, "max_model_len": 1024}


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (CacheConfig, {"block_size": 0}, "block_size"),
        (CacheConfig, {"kv_cache_memory_bytes": -1}, "kv_cache_memory_bytes"),
        (CacheConfig, {"gpu_memory_utilization": 1.1}, "gpu_memory_utilization"),
        (CacheConfig, {"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
        (CacheConfig, {"prefix_caching_hash_algo": "md5"}, "prefix_caching_hash_algo"),
        (CacheConfig, {"mamba_cache_mode": "some"}, "mamba_cache_mode"),
        (SchedulerConfig, {**SCHEDULER, "max_num_seqs": 0}, "max_num_seqs"),
        (SchedulerConfig, {**SCHEDULER, "policy": "random"}, "policy"),
        (SchedulerConfig, {**SCHEDULER, "watermark": -0.1}, "watermark"),
        (SchedulerConfig, {**SCHEDULER, "max_num_queued_reqs": -1}, "max_num_queued_reqs"),
        (
            SchedulerConfig,
            {**SCHEDULER, "enable_chunked_prefill": False, "max_num_batched_tokens": 512},
            "max_num_batched_tokens",
        ),
        (ParallelConfig, {"tensor_parallel_size": 0}, "tensor_parallel_size"),
        (ParallelConfig, {"master_port": 70000}, "master_port"),
        (KVTransferConfig, {"kv_role": "kv_boss"}, "kv_role"),
        (KVTransferConfig, {"kv_connector": "X"}, "kv_role"),
        (KVTransferConfig, {"kv_load_failure_policy": "hope"}, "kv_load_failure_policy"),
        (KVEventsConfig, {"publisher": "pigeon"}, "publisher"),
        (StructuredOutputsConfig, {"backend": "outlines"}, "backend"),
    ],
)
def test_a_bad_value_names_its_field(cls, values, field):
    with pytest.raises(ConfigError, match=field) as error:
        cls(**values)
    assert error.value.parameter == field
    assert "\n" not in str(error.value)


def test_configurations_are_frozen():
    config = SchedulerConfig(**SCHEDULER)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_num_seqs = 3


@pytest.mark.parametrize(
    ("role", "producer", "consumer"),
    [("kv_producer", True, False), ("kv_consumer", False, True), ("kv_both", True, True)],
)
def test_roles_of_kv_transfer(role, producer, consumer):
    config = KVTransferConfig(kv_connector="X", kv_role=role, kv_connector_extra_config={"a": 1})
    assert config.is_kv_transfer_instance
    assert (config.is_kv_producer, config.is_kv_consumer) == (producer, consumer)
    assert config.get_from_extra_config("a", 0) == 1
    assert config.get_from_extra_config("b", 0) == 0
    assert not KVTransferConfig().is_kv_transfer_instance


def test_the_current_configuration_is_a_stack():
    with pytest.raises(RuntimeError, match="set_current_vllm_config"):
        get_current_vllm_config()
    outer = EngineArgs(model="smollm2").create_engine_config()
    inner = EngineArgs(model="smollm2", seed=1).create_engine_config()
    with set_current_vllm_config(outer):
        with set_current_vllm_config(inner):
            assert get_current_vllm_config() is inner
        assert get_current_vllm_config() is outer
