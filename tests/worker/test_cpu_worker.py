"""Start-up: memory that is asked for is checked, and errors name the option."""

import dataclasses

import pytest

from tests.worker.driver import Driver, make_config, start_worker
from vllm.errors import CapacityError
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

GIB = 1 << 30


@pytest.fixture
def make_worker(model_dir):
    def make(kv_cache_memory_bytes: int | None) -> CPUWorker:
        config = make_config(model_dir)
        config = dataclasses.replace(
            config,
            cache_config=dataclasses.replace(
                config.cache_config, kv_cache_memory_bytes=kv_cache_memory_bytes
            ),
        )
        return CPUWorker(config, 0, 0, "tcp://127.0.0.1:0")

    return make


def test_bytes_asked_for_are_granted(make_worker):
    assert make_worker(123 << 20).determine_available_memory() == 123 << 20


def test_the_environment_says_how_much_where_the_option_does_not(make_worker, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.25")
    assert make_worker(None).determine_available_memory() == GIB // 4


@pytest.mark.parametrize(
    ("option", "asked"), [("--kv-cache-memory-bytes", 1 << 50), ("VLLM_CPU_KVCACHE_SPACE", None)]
)
def test_more_than_there_is_names_the_option_and_what_fits(make_worker, monkeypatch, option, asked):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", str(1 << 20))
    monkeypatch.setattr(current_platform, "get_device_available_memory", lambda: 3 * GIB)
    with pytest.raises(CapacityError, match=option) as caught:
        make_worker(asked).determine_available_memory()
    fits = int(str(caught.value).rsplit(" ", 1)[1])
    assert make_worker(fits).determine_available_memory() == fits


def test_a_full_machine_is_said_to_be_full(make_worker, monkeypatch):
    monkeypatch.setattr(current_platform, "get_device_available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="no memory is left"):
        make_worker(1).determine_available_memory()


def test_shutdown_lets_go_of_the_caches(model_dir):
    worker = start_worker(make_config(model_dir))
    Driver(worker, 16).step({})
    assert worker.model_runner.kv_caches
    worker.shutdown()
    worker.shutdown()
    assert not worker.model_runner.kv_caches


def test_shutdown_after_a_start_that_failed(make_worker):
    make_worker(1).shutdown()
