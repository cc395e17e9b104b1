"""Ways of getting blocks from one server to another: pushed, through host memory, as predicted."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from dataclasses import replace

import pytest

from tests.kv_transfer.harness import MAX_MODEL_LEN, Setup
from tests.kv_transfer.test_processes import compare, make_prompts
from vllm.entrypoints.cli import kv_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
        reason="needs nixl: pip install 'vllm[nixl]'",
    ),
]
LLAMA = Setup(model="llama", layout="LBHNC")
SMALL_SLOTS = {"staging_slot_bytes": 1 << 16}
BLOCKS = MAX_MODEL_LEN // 16


def of(**extra):
    return json.dumps(extra)


SETUPS = {
    "pushed": replace(
        LLAMA, connector="NixlPushConnector", extra=of(transfer_path="descriptors", **SMALL_SLOTS)
    ),
    "pushed through the rings": replace(
        LLAMA, connector="NixlPushConnector", extra=of(transfer_path="staging", **SMALL_SLOTS)
    ),
    "through host memory": replace(LLAMA, buffer_device="cpu", extra=of(**SMALL_SLOTS)),
}
TAKEN = {"pushed": "descriptors"}


@pytest.mark.parametrize("name", SETUPS)
def test_servers_write_the_tokens_of_one(fleet, name):
    """Layouts and block sizes of the two sides differ."""
    setup = SETUPS[name]
    decode = replace(setup, layout="BHLNC", block_size=32)
    compare(fleet, setup, decode, make_prompts(12))
    d = fleet.get(replace(decode, role="kv_consumer"))
    assert d.metric(f"vllm:kv_transfers_by_{TAKEN.get(name, 'staging')}_total") > 0


def predicted(fleet, setup, monkeypatch):
    """What ``vllm kv-plan`` says of a request of the greatest length."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", setup.layout)
    args = [fleet.checkpoint(setup.model), "--connector", "Nixl", "--dtype", "float32"]
    args += ["--max-model-len", str(MAX_MODEL_LEN), "--block-size", str(setup.block_size)]
    return kv_plan.predict_transfer(*kv_plan.plan(kv_plan.make_parser().parse_args(args)))


@pytest.mark.parametrize("layout", ["LBHNC", "BHLNC"])
def test_a_request_takes_the_descriptors_that_kv_plan_predicts(fleet, monkeypatch, layout):
    few = ("--num-gpu-blocks-override", str(BLOCKS + 2), "--no-enable-prefix-caching")
    setup = replace(LLAMA, layout=layout, options=few, extra=of(transfer_path="descriptors"))
    p, d = fleet.all_of(replace(setup, role="kv_producer"), replace(setup, role="kv_consumer"))
    rng = random.Random(1)
    names = ("transfer_descriptors", "transfer_bytes")
    found = []
    for _ in range(4):
        prompt = [rng.randrange(3, 190) for _ in range(MAX_MODEL_LEN - 1)]
        before = [d.metric(f"vllm:kv_{name}_total") for name in names]
        params = p.prefill(prompt)
        d.tokens(prompt, 1, params)
        p.wait_until_empty()
        d.wait_until_empty()
        counts = [d.metric(f"vllm:kv_{name}_total") for name in names]
        (blocks,) = params["remote_block_ids"]
        joins = sum(here + 1 == there for here, there in itertools.pairwise(blocks))
        found.append((joins, *(now - then for now, then in zip(counts, before, strict=True))))
    told = predicted(fleet, setup, monkeypatch)
    # Blocks that have been used lie apart, as the prediction has it.
    assert (0, told["transfer_descriptors"], told["transfer_bytes"]) in found
    assert all(size == told["transfer_bytes"] for _, _, size in found)
