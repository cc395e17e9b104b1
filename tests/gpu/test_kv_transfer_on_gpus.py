"""Prefill on one GPU, decode on another, by every way there is: servers as processes, real NIXL."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from tests.kv_transfer.harness import Fleet, Setup, in_parallel
from tests.kv_transfer.test_processes import make_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(280),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
        reason="needs nixl: pip install 'vllm[nixl]'",
    ),
]
NUM_TOKENS = 8
EAGER = ("--enforce-eager",)
SMALL_SLOTS = {"staging_slot_bytes": 1 << 16}
LLAMA = Setup(model="llama", layout="LBHNC", options=EAGER)


def of(**extra):
    return json.dumps(extra)


WAYS = {
    "descriptors": replace(LLAMA, extra=of(transfer_path="descriptors")),
    "staging": replace(LLAMA, extra=of(transfer_path="staging", **SMALL_SLOTS)),
    "mapped": replace(LLAMA, extra=of(transfer_path="mapped")),
    "auto": LLAMA,
    "push": replace(LLAMA, connector="NixlPushConnector", extra=of(transfer_path="descriptors")),
    "push staged": replace(
        LLAMA, connector="NixlPushConnector", extra=of(transfer_path="staging", **SMALL_SLOTS)
    ),
    "host buffer": replace(LLAMA, buffer_device="cpu"),
}
MODELS = ("mamba 2 and attention", "latent attention", "sliding windows")


def on(setup, gpu, role=None):
    environment = (("CUDA_VISIBLE_DEVICES", str(gpu)),)
    return replace(setup, role=role, environment=environment)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("gpus"), room=30, debug=False)
    try:
        yield made
    finally:
        made.close()


def compare(p, d, plain):
    prompts = make_prompts(12)
    expected = in_parallel(lambda prompt: plain.tokens(prompt, NUM_TOKENS), prompts)
    got = in_parallel(lambda prompt: d.tokens(prompt, NUM_TOKENS, p.prefill(prompt)), prompts)
    assert got == expected
    assert d.metric("vllm:kv_transfers_total") > 0
    assert d.metric("vllm:kv_failed_transfers_total") == 0
    p.wait_until_empty()
    d.wait_until_empty()
    return d


@pytest.mark.parametrize("way", WAYS)
def test_every_way_brings_the_tokens_of_one_server(fleet, way):
    """P on one GPU, D on the other; the layouts and block sizes of the two sides differ."""
    setup = WAYS[way]
    other = replace(setup, layout="BHLNC", block_size=32)
    servers = on(setup, 0, "kv_producer"), on(other, 1, "kv_consumer"), on(LLAMA, 1)
    d = compare(*fleet.all_of(*servers))
    other = {"push": "descriptors", "push staged": "staging", "host buffer": "staging"}
    took = None if way == "auto" else other.get(way, way)
    if took is not None:
        assert d.metric(f"vllm:kv_transfers_by_{took}_total") > 0


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_cache_brings_the_tokens_of_one_server(fleet, model):
    setup = Setup(model=model, options=EAGER)
    servers = on(setup, 0, "kv_producer"), on(setup, 1, "kv_consumer"), on(setup, 1)
    compare(*fleet.all_of(*servers))
