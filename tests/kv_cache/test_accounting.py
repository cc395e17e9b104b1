"""What specs say a request holds is what the managers give it, and waste follows from that."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, make_config, mamba, sliding
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache.equal_pages import plan_with_equal_pages
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

ATTENTION = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": "float16"}
SPECS = {
    "full": full(),
    "window": sliding(window=40),
    "window of a block": sliding(window=16),
    "window of one token": sliding(window=1),
    "chunked": ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=48),
    "latent": MLAAttentionSpec(**ATTENTION | {"block_size": 32}, compress_ratio=4),
    "window of latents": SlidingWindowMLASpec(**ATTENTION | {"block_size": 4}, sliding_window=8),
    "state": mamba(block_size=512),
    "kept states": mamba(block_size=16, mamba_cache_mode="align"),
    "all states": mamba(block_size=16, mamba_cache_mode="all"),
}


@pytest.mark.parametrize("num_tokens", [1, 16, 33, 47, 48, 100, 256])
@pytest.mark.parametrize("name", SPECS)
def test_managers_hold_what_specs_say(name, num_tokens):
    spec = SPECS[name]
    config = make_config(max_model_len=512)
    manager = KVCacheManager(
        KVCacheConfig(400, [], [KVCacheGroupSpec(["l.0"], spec)]), 512, enable_caching=False
    )
    request = Request("r", [1] * num_tokens, SamplingParams(max_tokens=1))
    for start in range(0, num_tokens, 40):
        count = min(40, num_tokens - start)
        assert manager.allocate_slots(request, count) is not None
        request.num_computed_tokens = start + count
    manager.remove_skipped_blocks("r", num_tokens)
    (row,) = manager.get_blocks("r").blocks
    held = sum(not block.is_null for block in row)
    assert held == spec.blocks_at(num_tokens, config)
    if hasattr(spec, "state_column"):
        column = spec.state_column(num_tokens)
        assert not row[column].is_null


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(
        [
            *SPECS.values(),
            ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=40),
            ChunkedLocalAttentionSpec(**ATTENTION, attention_chunk_size=5),
            sliding(window=17),
            mamba(block_size=16, mamba_cache_mode="align", num_speculative_blocks=2),
            mamba(block_size=512, num_speculative_blocks=2),
        ]
    ),
    longest=st.integers(1, 512),
    steps=st.lists(st.integers(1, 130), min_size=1, max_size=40),
)
def test_no_request_ever_holds_more_than_the_plan_reserves(spec, longest, steps):
    """Whatever the steps, the pool that the planner thinks enough for the longest request is."""
    most = max(steps)
    config = make_config(max_model_len=longest, max_num_batched_tokens=most)
    reserved = spec.max_resident_blocks(config)
    manager = KVCacheManager(
        KVCacheConfig(1 + reserved, [], [KVCacheGroupSpec(["l.0"], spec)]),
        longest,
        enable_caching=False,
        max_tokens_per_step=most,
    )
    assert manager.get_max_request_tokens() == longest
    request = Request("r", [1] * longest, SamplingParams(max_tokens=1))
    for count in steps:
        count = min(count, longest - request.num_computed_tokens)
        if count:
            assert manager.allocate_slots(request, count) is not None
            request.num_computed_tokens += count
    manager.free(request)
    manager.check_integrity()


def test_payload_is_what_the_next_token_reads():
    config = make_config(max_model_len=512)
    assert full(2, 4).payload_bytes_at(100, config) == 100 * 2 * 8 * 4
    assert sliding(2, 4, window=40).payload_bytes_at(100, config) == 39 * 2 * 8 * 4
    assert SPECS["chunked"].payload_bytes_at(100, config) == 4 * 16 * 2
    assert SPECS["latent"].payload_bytes_at(100, config) == 25 * 8 * 2
    padded = replace(SPECS["state"], page_size_padded=128)
    assert padded.payload_bytes_at(100, config) == 80
    pages = {"a": full(1, 4), "b": full(3, 4)}
    both = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=pages)
    assert both.payload_bytes_at(10, config) == 10 * 4 * 8 * 4


def test_an_encoders_output_is_sized_by_the_encoder():
    config = make_config()  # max_source_positions 100
    cross = CrossAttentionSpec(**ATTENTION)
    assert cross.blocks_at(5, config) == cross.max_resident_blocks(config) == 7
    assert cross.payload_bytes_at(5, config) == 100 * 8 * 2 * 2
    none = EncoderOnlyAttentionSpec(**ATTENTION)
    assert (none.blocks_at(5, config), none.payload_bytes_at(5, config)) == (0, 0)


# The rule of equal pages, by hand.


def test_equal_pages_by_hand():
    """10 full and 52 windowed layers: groups of 10, six of them windowed, two slots short."""
    kind = {"heads": 16, "head_size": 128, "dtype": "bfloat16"}
    names = [f"l.{i}" for i in range(62)]
    specs = {
        name: full(**kind) if i % 6 == 5 else sliding(**kind, window=1024)
        for i, name in enumerate(names)
    }
    config = make_config(max_model_len=131_072)
    plan = plan_with_equal_pages(specs, config)
    assert sorted(len(group) for group in plan.groups) == [8, 8, 9, 9, 9, 9, 10]
    page = 16 * 16 * 256 * 2
    assert plan.held_bytes(8192, config) == (512 + 6 * 64) * 10 * page


def test_equal_pages_make_one_size_of_groups_that_are_nearly_equal():
    """10 and 8: 10 is under 1.5 times 8, so groups have 10 slots, and two of one stay empty."""
    specs = {f"l.{i}": full() if i < 8 else sliding() for i in range(18)}
    plan = plan_with_equal_pages(specs, make_config())
    assert plan.bytes_per_block == 10 * full().page_size_bytes


def test_equal_pages_enlarge_attention_blocks_beside_states():
    specs = {
        "a": full(2, 256, 16, "bfloat16"),
        "s": mamba(((3, 8192), (32, 128, 128)), ("bfloat16", "bfloat16")),
    }
    plan = plan_with_equal_pages(specs, make_config(max_model_len=8192))
    assert plan.specs["a"].block_size == 544
    assert plan.specs["s"].page_size_bytes == 1_114_112
    assert plan.bytes_per_block == 1_114_112


def test_pages_that_cannot_be_equal_overlay_each_other():
    odd = {"m": replace(SPECS["latent"], head_size=9), "f": full(), "g": full()}
    plan = plan_with_equal_pages(odd, make_config())
    assert plan.groups == (("m",), ("f", "g"))
    assert plan.bytes_per_block == 2 * full().page_size_bytes
