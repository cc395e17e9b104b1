"""Connectors that store and bring back KV inside the step, end to end on a tiny model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kv_transfer import outside_connector
from tests.kv_transfer.conftest import cached, greedy, prompt_of
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import HostSlots
from vllm.errors import CapacityError, ConfigError

PROMPTS = [prompt_of(70, 1), prompt_of(33, 2), prompt_of(100, 3), prompt_of(17, 4)]


def transfer(name, **extra):
    return {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra.pop("extra", {}),
        **extra,
    }


def example(tmp_path):
    return transfer("ExampleConnector", extra={"shared_storage_path": str(tmp_path)})


def test_example_hands_prompts_from_one_engine_to_another(make_llm, tmp_path):
    plain = greedy(make_llm(), PROMPTS)
    first = make_llm(kv_transfer_config=example(tmp_path))
    assert greedy(first, PROMPTS) == plain
    second = make_llm(kv_transfer_config=example(tmp_path), enable_prefix_caching=False)
    assert cached(second, PROMPTS[0]) == 64
    assert greedy(second, PROMPTS) == plain


def test_example_saves_a_prompt_that_came_in_chunks(make_llm, tmp_path):
    first = make_llm(kv_transfer_config=example(tmp_path), max_num_batched_tokens=32)
    plain = greedy(first, PROMPTS)
    second = make_llm(kv_transfer_config=example(tmp_path), enable_prefix_caching=False)
    assert cached(second, PROMPTS[2]) == 96
    assert greedy(second, PROMPTS) == plain


def test_example_computes_from_what_it_read(make_llm, tmp_path):
    """Otherwise the tests above would pass without any load."""
    first = make_llm(kv_transfer_config=example(tmp_path))
    plain = greedy(first, PROMPTS[:1])
    for file in tmp_path.glob("*/*.safetensors"):
        save_file({"kv": load_file(file)["kv"] * -1}, file)
    second = make_llm(kv_transfer_config=example(tmp_path))
    assert greedy(second, PROMPTS[:1]) != plain


def test_example_ignores_what_its_writer_did_not_finish(make_llm, tmp_path):
    first = make_llm(kv_transfer_config=example(tmp_path))
    plain = greedy(first, PROMPTS[:1])
    (marker,) = tmp_path.glob("*/complete")
    marker.unlink()
    second = make_llm(kv_transfer_config=example(tmp_path))
    assert cached(second, PROMPTS[0]) == 0
    assert greedy(second, PROMPTS[:1]) == plain
    assert marker.exists() or cached(second, PROMPTS[0]) > 0


def offloading(blocks):
    return transfer("OffloadingConnector", extra={"num_cpu_blocks": blocks})


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BHLNC", "LHBNC"])
def test_offloaded_blocks_come_back_after_eviction(make_llm, monkeypatch, layout):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    backend = {} if layout in ("LBHNC", "BHLNC") else {"attention_backend": "TORCH_REF"}
    plain = greedy(make_llm(**backend), PROMPTS)
    llm = make_llm(kv_transfer_config=offloading(64), num_gpu_blocks_override=18, **backend)
    assert greedy(llm, PROMPTS) == plain
    # The pool of 17 blocks has room for one prompt of 240 tokens only: all else is evicted.
    greedy(llm, [prompt_of(240, 9)])
    assert cached(llm, PROMPTS[0]) == 64
    assert greedy(llm, PROMPTS) == plain
    llm.llm_engine.client.call_utility("check_integrity")


def test_host_memory_forgets_what_was_used_least(make_llm):
    llm = make_llm(kv_transfer_config=offloading(8), num_gpu_blocks_override=18)
    plain = greedy(llm, PROMPTS[:1])
    assert llm.reset_prefix_cache()
    assert cached(llm, PROMPTS[0]) == 64
    greedy(llm, [prompt_of(240, 9)], count=1)
    assert llm.reset_prefix_cache()
    assert cached(llm, PROMPTS[0]) == 0
    assert greedy(llm, PROMPTS[:1]) == plain


def test_slots_are_given_by_last_use():
    slots = HostSlots(2)
    assert slots.put(b"a") == (0, None) and slots.put(b"b") == (1, None)
    assert slots.use(b"a") == 0
    assert slots.put(b"c") == (1, b"b")
    assert b"a" in slots and b"b" not in slots and len(slots) == 2
    slots.clear()
    assert len(slots) == 0 and slots.put(b"d")[1] is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (transfer("OffloadingConnector"), ConfigError, "cpu_bytes_to_use"),
        (
            transfer("OffloadingConnector", extra={"cpu_bytes": 5}),
            ConfigError,
            "unknown field `cpu_bytes`",
        ),
        (
            transfer("OffloadingConnector", extra={"cpu_bytes_to_use": 100}),
            CapacityError,
            "raise cpu_bytes_to_use",
        ),
        (transfer("Exampel"), ConfigError, "connector 'Exampel' is unknown"),
        (
            transfer("Missing", kv_connector_module_path="tests.kv_transfer.outside_connector"),
            ConfigError,
            "has no connector Missing",
        ),
        (
            transfer("X", kv_connector_module_path="no.such.module"),
            ConfigError,
            "no.such.module cannot be imported",
        ),
        (transfer("MultiConnector"), ConfigError, '"connectors"'),
    ],
)
def test_what_cannot_work_is_refused_at_start(make_llm, config, error, message):
    with pytest.raises(error, match=message):
        make_llm(kv_transfer_config=config)


def outside(**extra):
    return transfer(
        "OutsideConnector",
        kv_connector_module_path="tests.kv_transfer.outside_connector",
        extra=extra,
    )


def test_an_outside_connector_works_layer_by_layer(make_llm):
    outside_connector.STORE.clear()
    plain = greedy(make_llm(), PROMPTS)
    first = make_llm(kv_transfer_config=outside(), enable_prefix_caching=False)
    outside_connector.CALLS.clear()
    assert greedy(first, PROMPTS[:1], count=1) == [plain[0][:1]]
    layers = list(next(iter(outside_connector.STORE.values())))
    assert len(layers) == 2
    assert [
        "start_load_kv",
        f"wait {layers[0]}",
        f"save {layers[0]}",
        f"wait {layers[1]}",
        f"save {layers[1]}",
        "wait_for_save",
    ] == outside_connector.CALLS
    greedy(first, PROMPTS)
    assert cached(first, PROMPTS[2]) == 96
    assert greedy(first, PROMPTS) == plain
    wrong = make_llm(kv_transfer_config=outside(shift=3.0), enable_prefix_caching=False)
    assert greedy(wrong, PROMPTS) != plain


def test_multi_loads_from_the_first_that_has_it_and_saves_to_all(make_llm, tmp_path):
    parts = [example(tmp_path), offloading(64)]
    config = transfer("MultiConnector", extra={"connectors": parts})
    llm = make_llm(kv_transfer_config=config, num_gpu_blocks_override=18)
    plain = greedy(llm, PROMPTS)
    assert list(tmp_path.glob("*/complete"))
    greedy(llm, [prompt_of(240, 9)])
    assert cached(llm, PROMPTS[0]) == 64
    for marker in tmp_path.glob("*/complete"):
        marker.unlink()
    greedy(llm, [prompt_of(240, 9)])
    assert cached(llm, PROMPTS[0]) == 64
    assert greedy(llm, PROMPTS) == plain


def test_parts_that_need_different_layouts_are_refused(make_llm, monkeypatch):
    nhd = type("NHD", (outside_connector.OutsideConnector,), {})
    nhd.get_required_kvcache_layout = classmethod(lambda cls, config: "NHD")
    monkeypatch.setattr(outside_connector, "NHDConnector", nhd, raising=False)
    path = {"kv_connector_module_path": "tests.kv_transfer.outside_connector"}
    parts = [transfer("NHDConnector", **path), transfer("OutsideConnector", **path)]
    config = transfer("MultiConnector", extra={"connectors": parts})
    with pytest.raises(ConfigError, match="NHDConnector needs LBNHC, OutsideConnector needs LBHNC"):
        make_llm(kv_transfer_config=config)


def test_a_registered_connector_needs_no_module_path(make_llm, monkeypatch):
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    KVConnectorFactory.register_connector(
        "MyConnector", "tests.kv_transfer.outside_connector", "OutsideConnector"
    )
    with pytest.raises(ConfigError, match="registered already"):
        KVConnectorFactory.register_connector("MyConnector", "x", "y")
    outside_connector.STORE.clear()
    greedy(make_llm(kv_transfer_config=transfer("MyConnector")), PROMPTS[:1])
    assert outside_connector.STORE


def test_every_registered_connector_can_be_loaded():
    for name in KVConnectorFactory._registry:
        cls = KVConnectorFactory.get_connector_class_by_name(name)
        assert cls.__name__ == name


def test_stored_files_hold_the_blocks_of_the_prompt(make_llm, tmp_path):
    llm = make_llm(kv_transfer_config=example(tmp_path))
    greedy(llm, PROMPTS[:1], count=1)
    (folder,) = tmp_path.iterdir()
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) == 2 and json.dumps(files).count("rank0") == 2
    kv = load_file(folder / files[0])["kv"]
    assert kv.shape == (4, 2, 16, 32) and kv.dtype == torch.float32
