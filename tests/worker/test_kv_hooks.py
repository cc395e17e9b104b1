"""What happens round a forward pass: write checks in debug mode, and the connector's calls."""

import pytest
import torch

from tests.worker.driver import Driver, hf_greedy, make_config, start_worker
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.v1.worker.device import CPUDeviceLayer
from vllm.v1.worker.model_runner import ModelRunner

PROMPTS = {"a": [3, 14, 15, 92, 65], "b": list(range(20, 61))}


class RecordingConnector(KVConnectorBase_V1):
    """Moves nothing; notes what it is asked."""

    def __init__(self, vllm_config, kv_cache_config) -> None:
        super().__init__(vllm_config, KVConnectorRole.WORKER, kv_cache_config)
        self.calls: list[str] = []
        self.metadata = []
        self.kv_caches: dict[str, torch.Tensor] = {}
        self.finished: list[set[str]] = []

    def register_kv_caches(self, kv_caches) -> None:
        self.kv_caches = kv_caches

    def handle_preemptions(self, kv_connector_metadata) -> None:
        self.calls.append("preemptions")

    def start_load_kv(self, forward_context, **kwargs) -> None:
        self.metadata.append(self._get_connector_metadata())
        self.calls.append("load")

    def wait_for_layer_load(self, layer_name) -> None:
        self.calls.append("layer")

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs) -> None:
        self.calls.append("save")

    def wait_for_save(self) -> None:
        self.calls.append("saved")

    def get_finished(self, finished_req_ids):
        self.finished.append(set(finished_req_ids))
        return (set(finished_req_ids) or None), None

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens) -> None:
        return

    def build_connector_meta(self, scheduler_output):
        return None


def test_debug_mode_accepts_honest_steps(make_driver, hf_model, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    driver = make_driver(kv_cache_memory_bytes=2 << 20)
    for req_id, prompt in PROMPTS.items():
        driver.add(req_id, prompt)
    driver.run({"a": 5, "b": 4}, chunk=13)
    driver.preempt("b")
    driver.run({"a": 9, "b": 6})
    assert driver.requests["b"].output == hf_greedy(hf_model, PROMPTS["b"], 6)


def test_debug_mode_catches_a_foreign_write(make_driver, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    driver = make_driver(kv_cache_memory_bytes=2 << 20)
    driver.add("a", PROMPTS["a"])
    runner = driver.worker.model_runner
    model, block = runner.model, driver.free[0]

    def stray(input_ids, positions):
        runner.kv_caches[1][block, 0, 0, 0] = 1.0
        return model(input_ids, positions)

    runner.model = stray
    with pytest.raises(AssertionError, match=f"block {block}"):
        driver.step({"a": 5})


def test_a_connector_is_called_in_order(model_dir):
    config = make_config(model_dir)
    worker = start_worker(config)
    connector = RecordingConnector(config, worker.kv_cache_config)
    runner = ModelRunner(config, CPUDeviceLayer(), lambda kv_cache_config: connector)
    runner.set_model(worker.get_model())
    runner.initialize_kv_cache(worker.kv_cache_config)
    worker.model_runner = runner
    assert connector.kv_caches.keys() == runner.layers.keys()
    num_blocks = worker.kv_cache_config.num_blocks
    assert {cache.shape[0] for cache in connector.kv_caches.values()} == {num_blocks}

    driver = Driver(worker, 16)
    driver.add("a", PROMPTS["a"])
    output = driver.schedule({"a": 5})
    output.kv_connector_metadata = "step one"
    result = worker.execute_model(output)
    assert connector.calls == [
        "preemptions",
        "load",
        *["layer", "save"] * len(runner.layers),
        "saved",
    ]
    assert connector.metadata == ["step one"]
    assert not connector.has_connector_metadata()
    assert result.kv_connector_output is None

    driver.take({"a": 5}, result)
    driver.finish("a")
    output = driver.schedule({})
    output.kv_connector_metadata = "nothing to compute"
    result = worker.execute_model(output)
    assert connector.finished[-1] == {"a"}
    assert result.kv_connector_output.finished_sending == {"a"}
    assert result.req_ids == []
