"""Caches that store other numbers on the two sides, or scales among them: what arrives is right."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from tests.engine.conftest import ENGINE_ARGS
from tests.entrypoints.server import free_port
from tests.kv_transfer.harness import SCALED, SCALES, Setup, in_parallel, save_with_scales
from tests.kv_transfer.test_nixl import config, core_of, decode, layer_tokens, prefill
from tests.kv_transfer.test_processes import NUM_TOKENS, make_prompts
from vllm import LLM

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
PROMPT = {"prompt_token_ids": [3 + (i * 7) % 90 for i in range(70)]}


@pytest.fixture
def engine_of(tmp_path, monkeypatch):
    """An engine in this process over a llama of two layers with scales, in bfloat16."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    save_with_scales(tmp_path)
    made = []

    def make(role, cache_dtype, block_size):
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        given = {
            **ENGINE_ARGS,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "block_size": block_size,
            "kv_cache_dtype": cache_dtype,
            "kv_transfer_config": config(role, staging_slot_bytes=1 << 14),
            "attention_config": {"backend": "TORCH_REF"},
        }
        made.append(LLM(str(tmp_path), **given))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


def as_numbers(stored, dtype):
    """``(tokens, heads, content)`` in float32, with the scales of K and V."""
    if dtype == torch.bfloat16:
        return stored.view(dtype).float()
    return stored.view(dtype).float() * scales_like(stored.shape[-1])


def scales_like(content):
    return torch.tensor(SCALES).repeat_interleave(content // 2)


@pytest.mark.parametrize(("theirs", "ours"), [("auto", "fp8"), ("fp8", "auto")])
def test_numbers_are_converted_with_the_scales_of_the_checkpoint(engine_of, theirs, ours):
    """K by its scale and V by its own; real bfloat16; blocks of other sizes."""
    p, d = engine_of("kv_producer", theirs, 16), engine_of("kv_consumer", ours, 32)
    answers = prefill(p, [PROMPT])
    dtypes = {"auto": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    there = [layer_tokens(p, answers[0]["remote_block_ids"][0], 16, 70, i) for i in (0, 1)]
    (tokens,), (output,) = decode(d, [PROMPT], answers, count=1)
    assert tokens and output.num_cached_tokens == 70
    pool = core_of(d).scheduler.kv_cache_manager.block_pool
    full = [block.block_id for block in pool.blocks if block.block_hash]
    assert len(full) == 2
    for layer, stored in enumerate(there):
        numbers = as_numbers(stored, dtypes[theirs])
        if ours == "auto":
            expected = numbers.bfloat16().view(torch.uint8)
        else:
            largest = torch.finfo(torch.float8_e4m3fn).max
            scaled = numbers / scales_like(numbers.shape[-1])
            expected = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
        held = core_of(d).executor.worker.model_runner.kv_caches[layer]
        found = held[full].transpose(1, 2).contiguous().view(torch.uint8)
        wanted = expected[:64].unflatten(0, (2, 32))
        assert {block.numpy().tobytes() for block in found} == {
            block.numpy().tobytes() for block in wanted.contiguous()
        }


ONE_LAYER = Setup(model=SCALED)
"""What one layer stores does not depend on what it reads, so tokens are those of one server."""


def exchange(fleet, prefill_setup, decode_setup, count=8):
    """(through both, by one server that is as the decoder is) for each prompt."""
    plain_setup = replace(decode_setup, role=None)
    p, d, plain = fleet.all_of(
        replace(prefill_setup, role="kv_producer"),
        replace(decode_setup, role="kv_consumer"),
        plain_setup,
    )
    prompts = [[3 + token % 90 for token in prompt] for prompt in make_prompts(count)]
    right = in_parallel(lambda prompt: plain.tokens(prompt, NUM_TOKENS), prompts)
    got = in_parallel(lambda prompt: d.tokens(prompt, NUM_TOKENS, p.prefill(prompt)), prompts)
    assert d.metric("vllm:kv_transfers_total") > 0
    assert d.metric("vllm:kv_failed_transfers_total") == 0
    for server in (p, d):
        server.wait_until_empty()
    return got, right


def in_bfloat16(cache_dtype, tp):
    options = ("--dtype", "bfloat16", "--kv-cache-dtype", cache_dtype)
    return replace(ONE_LAYER, tp=tp, options=options)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [(2, 1), (1, 2)])
def test_a_decoder_of_fp8_says_what_one_server_of_fp8_says(fleet, tp):
    got, right = exchange(fleet, in_bfloat16("auto", tp[0]), in_bfloat16("fp8", tp[1]))
    assert got == right


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [(2, 1), (1, 2)])
def test_a_decoder_of_bfloat16_reads_fp8_of_others(fleet, tp):
    """The numbers are coarser than its own: most first tokens are the same."""
    got, right = exchange(fleet, in_bfloat16("fp8", tp[0]), in_bfloat16("auto", tp[1]), 16)
    same = sum(mine[0] == theirs[0] for mine, theirs in zip(got, right, strict=True))
    assert same >= 12, f"{same} of {len(got)}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("cache_dtype", "theirs", "ours"),
    [
        ("int8_per_token_head", (2, 16), (1, 64)),
        ("fp8_per_token_head", (1, 64), (2, 16)),
        ("int4_per_token_head", (2, 64), (1, 16)),
    ],
)
def test_scales_of_tokens_and_heads_go_with_them(fleet, cache_dtype, theirs, ours):
    """Ranks and block sizes differ."""
    options = ("--kv-cache-dtype", cache_dtype)
    setups = [
        replace(ONE_LAYER, tp=tp, block_size=size, options=options) for tp, size in (theirs, ours)
    ]
    got, right = exchange(fleet, *setups)
    assert got == right
