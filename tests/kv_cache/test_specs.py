"""Bytes per block of every kind of cache, and what is refused when a spec is made."""

import pickle
from fractions import Fraction

import pytest
import torch

from tests.kv_cache.helpers import full, make_config, mamba, sliding
from vllm.errors import ConfigError
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    ContentFormat,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    TQFullAttentionSpec,
    UniformTypeKVCacheSpecs,
)

M = KVQuantMode


def latent(cls=MLAAttentionSpec, block_size=256, **kw):
    kw = {"head_size": 512, "dtype": "uint8", **kw}
    return cls(block_size=block_size, num_kv_heads=1, **kw)


def test_llama_8b_block():
    spec = full(8, 128, 16, "bfloat16")
    assert spec.page_size_bytes == 65_536
    assert (spec.num_heads, spec.num_states, spec.state_content_size_bytes) == (8, 16, 512)
    assert spec.content_parts == (("k", 256), ("v", 256))


@pytest.mark.parametrize(
    ("mode", "dtype", "heads", "content"),
    [
        (M.NONE, "bfloat16", 8, 512),
        (M.FP8_PER_TENSOR, "uint8", 8, 256),
        (M.INT8_PER_TOKEN_HEAD, "int8", 8, 264),
        (M.FP8_PER_TOKEN_HEAD, "uint8", 8, 264),
        (M.INT4_PER_TOKEN_HEAD, "uint8", 8, 136),
        (M.NVFP4, "uint8", 16, 72),
    ],
)
def test_content_of_quantised_caches(mode, dtype, heads, content):
    """D = 128, 8 heads."""
    spec = full(8, 128, 16, dtype, kv_quant_mode=mode)
    assert (spec.num_heads, spec.state_content_size_bytes) == (heads, content)
    assert spec.page_size_bytes == heads * 16 * content
    assert sum(size for _, size in spec.content_parts) == content


def test_k_and_v_of_different_width():
    spec = full(4, 192, 16, "bfloat16", head_size_v=128)
    assert spec.state_content_size_bytes == (192 + 128) * 2
    assert spec.page_size_bytes == 4 * 16 * 640
    assert spec.content_parts == (("k", 384), ("v", 256))


def test_latent_formats():
    assert latent(head_size=576, dtype="bfloat16").state_content_size_bytes == 1152
    assert latent(cache_dtype_str="fp8_ds_mla").state_content_size_bytes == 656
    assert latent(cache_dtype_str="nvfp4_ds_mla").state_content_size_bytes == 352
    v4 = {"cache_dtype_str": "fp8_ds_mla", "model_version": "deepseek_v4", "alignment": 576}
    c4 = latent(compress_ratio=4, **v4)
    assert (c4.num_states, c4.unpadded_page_size_bytes, c4.page_size_bytes) == (64, 37_376, 37_440)
    assert c4.tokens_per_state == 4
    c128 = latent(compress_ratio=128, **v4)
    assert (c128.num_states, c128.page_size_bytes) == (2, 1_728)
    assert latent(compress_ratio=4, head_size=132).page_size_bytes == 8_448
    swa = latent(SlidingWindowMLASpec, block_size=64, sliding_window=128, **v4)
    assert swa.page_size_bytes == 37_440
    state = latent(
        SlidingWindowMLASpec,
        block_size=4,
        head_size=2048,
        dtype="float32",
        sliding_window=8,
        alignment=576,
    )
    assert (state.state_content_size_bytes, state.page_size_bytes) == (8_192, 32_832)
    assert all(s.content_format is ContentFormat.LATENT for s in (c4, swa, state))
    assert not c4.head_axis_is_sliceable


def test_several_states_a_token():
    assert latent(tokens_per_state=Fraction(1, 2), block_size=16).num_states == 32


def test_turboquant_slot():
    spec = TQFullAttentionSpec(
        block_size=16, num_kv_heads=4, head_size=128, dtype="uint8", tq_slot_size=112
    )
    assert spec.page_size_bytes == 16 * 4 * 112
    assert spec.content_format is ContentFormat.PACKED_SLOT


def test_packings_that_backends_choose():
    groups = full(4, 128, 16, "uint8", num_head_slots=8, state_content_bytes=128)
    assert groups.content_format is ContentFormat.KV_HEAD_GROUPS
    assert (groups.head_sides, groups.head_axis_is_sliceable) == (2, True)
    sides = full(4, 128, 16, "bfloat16", num_head_slots=2, state_content_bytes=4 * 128 * 2)
    assert sides.content_format is ContentFormat.KV_SIDES
    assert not sides.head_axis_is_sliceable
    assert (
        groups.page_size_bytes * 2
        == sides.page_size_bytes
        == full(4, 128, 16, "bfloat16").page_size_bytes
    )


def test_nvfp4_is_not_cut_by_head_and_keeps_its_page_together():
    spec = full(4, 128, 16, "uint8", kv_quant_mode=M.NVFP4)
    assert not spec.head_axis_is_sliceable
    assert spec.needs_block_contiguous


def test_state_page_of_the_conformance_vector():
    spec = mamba()
    assert [(s.offset, s.size_bytes) for s in spec.state_table] == [(0, 48), (48, 32)]
    assert spec.page_size_bytes == 80
    assert (spec.num_heads, spec.num_states, spec.tokens_per_state) == (1, 1, -1)
    assert mamba(page_size_padded=96).page_size_bytes == 96
    assert mamba(page_size_padded=96).unpadded_page_size_bytes == 80


def test_qwen3_next_page():
    spec = mamba(((3, 8192), (32, 128, 128)), ("bfloat16", "bfloat16"))
    assert [state.size_bytes for state in spec.state_table] == [49_152, 1_048_576]
    assert spec.page_size_bytes == 1_097_728


def test_a_state_that_its_dtype_does_not_divide_is_refused_by_layer_and_state():
    with pytest.raises(ConfigError, match=r"layer l\.7: state 1 \(2, 4\).*byte 18.*float32"):
        mamba(shapes=((3, 3), (2, 4)), layer_name="l.7")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: mamba(page_size_padded=82), r"82 bytes.*4-byte float32.*pad the page to 84"),
        (lambda: mamba(page_size_padded=76), "smaller than its states' 80"),
        (lambda: mamba(dtypes=("bfloat16",)), "2 state shapes and 1 dtypes"),
        (lambda: mamba(mamba_cache_mode="some"), "none, align or all"),
        (lambda: mamba(shapes=((0, 8), (2, 4))), "size 0 of state 0 must be .* at least 1, not 0"),
        (lambda: mamba(shapes=((3, 8), (-2, 4))), "size 0 of state 1 must be .*, not -2"),
        (lambda: mamba(page_size_padded=0), "page_size_padded must be .* at least 1, not 0"),
        (lambda: mamba(num_speculative_blocks=-1), "num_speculative_blocks must be"),
        (lambda: mamba(conv_state_layout="DX"), "conv_state_layout must be SD or DS, not 'DX'"),
        (lambda: mamba(sharded_axes=(0, 2)), r"state \(2, 4\) of mamba2 has no axis 2"),
        (lambda: full(block_size=0), "block_size must be a whole number of at least 1, not 0"),
        (lambda: full(block_size=16.0), "block_size must be a whole number .* not 16.0"),
        (lambda: full(block_size="16"), "block_size must be a whole number .* not '16'"),
        (lambda: full(heads=True), "num_kv_heads must be a whole number"),
        (lambda: full(heads=0), "num_kv_heads must be a whole number of at least 1"),
        (lambda: full(head_size_v=-1), "head_size_v must be a whole number of at least 0"),
        (lambda: full(num_head_slots=0), "num_head_slots must be"),
        (lambda: full(state_content_bytes=-4), "state_content_bytes must be"),
        (lambda: full(tokens_per_state=0), "tokens_per_state must be a positive"),
        (lambda: full(tokens_per_state=0.5), "tokens_per_state must be .* not 0.5"),
        (lambda: full(tokens_per_state=3), "not hold a whole number of states of 3 tokens"),
        (lambda: full(block_stride_alignment=0), "block_stride_alignment must be"),
        (
            lambda: full(head_size=6, dtype="int8", kv_quant_mode=M.INT8_PER_TOKEN_HEAD),
            r"scale behind the data .* multiples of 4, not \(6, 6\)",
        ),
        (
            lambda: full(
                dtype="int8", kv_quant_mode=M.INT8_PER_TOKEN_HEAD, page_size_padded=2 * 16 * 16 + 2
            ),
            "not a multiple of the 4-byte scales",
        ),
        (
            lambda: SinkFullAttentionSpec(
                block_size=16, num_kv_heads=1, head_size=4, dtype="int8", sink_len=-1
            ),
            "sink_len must be",
        ),
        (lambda: UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={}), "no kind at all"),
        (
            lambda: UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full()}),
            "blocks of 32 tokens cannot hold layers with blocks of 16",
        ),
        (lambda: latent(dtype="bfloat16", cache_dtype_str="fp8_ds_mla"), "dtype uint8"),
        (lambda: full(dtype="int3"), "cannot hold dtype 'int3'"),
        (lambda: full(page_size_padded=16), "smaller than its content"),
        (lambda: full(page_size_padded=1026), "not a multiple of the 4-byte"),
        (lambda: full(kv_quant_mode=M.INT8_PER_TOKEN_HEAD), "single bytes, not float32"),
        (lambda: full(dtype="uint8", kv_quant_mode=M.NVFP4), "multiple of 16"),
        (lambda: full(head_size=3, dtype="uint8", kv_quant_mode=M.INT4_PER_TOKEN_HEAD), "of 8"),
        (lambda: full(state_content_bytes=6), "whole number of float32"),
        (lambda: sliding(window=0), "sliding_window must be .* at least 1"),
        (lambda: latent(alignment=0), "alignment must be .* at least 1"),
        (lambda: latent(dtype="bfloat16", head_size=577, alignment=3, block_size=1), "multiple"),
        (lambda: latent(compress_ratio=0), "compress_ratio must be .* at least 1"),
        (lambda: latent(compress_ratio=4, tokens_per_state=8), "contradict"),
        (lambda: MLAAttentionSpec(block_size=1, num_kv_heads=2, head_size=4, dtype="int8"), "one"),
        (
            lambda: TQFullAttentionSpec(
                block_size=16, num_kv_heads=4, head_size=128, dtype="uint8"
            ),
            "tq_slot_size",
        ),
        (lambda: latent(compress_ratio=3).num_states, "multiple of 3"),
    ],
)
def test_refused_when_made(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_dtypes_compare_by_name():
    by_name, by_type = full(dtype="bfloat16"), full(dtype=torch.bfloat16)
    assert by_name == by_type
    assert hash(by_name) == hash(by_type)
    assert by_name.torch_dtype is torch.bfloat16
    assert by_name != full(dtype="float16")
    states = mamba(dtypes=(torch.bfloat16, torch.float32))
    assert states == mamba()


@pytest.mark.parametrize("spec", [full(), sliding(), mamba(), latent(compress_ratio=4)])
def test_specs_travel_between_processes(spec):
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_names_and_draft_mark_do_not_part_layers():
    assert full().with_layer_name("a") == full(is_draft=True)


def test_blocks_that_one_request_holds():
    config = make_config(max_model_len=1000, max_num_batched_tokens=100)
    assert full().max_resident_blocks(config) == 63
    assert full().max_memory_usage_bytes(config) == 63 * 1024
    assert sliding(window=64).max_resident_blocks(config) == 12  # cdiv(63 + 100, 16) + 1
    assert sliding(window=2000).max_resident_blocks(config) == 64
    chunked = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=4, dtype="int8", attention_chunk_size=128
    )
    assert chunked.max_resident_blocks(config) == 15
    cross = CrossAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype="int8")
    assert cross.max_resident_blocks(config) == 7  # 100 positions of the encoder
    encoder = EncoderOnlyAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype="int8")
    assert (encoder.page_size_bytes, encoder.max_resident_blocks(config)) == (0, 0)
    assert mamba().max_resident_blocks(config) == 1
    align = mamba(mamba_cache_mode="align", num_speculative_blocks=2, block_size=16)
    assert align.max_resident_blocks(config) == 6  # twice, at a boundary
    assert align.max_num_blocks_per_req(config, 1000) == 65
    assert mamba(num_speculative_blocks=2).max_num_blocks_per_req(config, 1000) == 3
    assert mamba(mamba_cache_mode="all", block_size=16).max_resident_blocks(config) == 63
    split = make_config(max_model_len=1000, decode_context_parallel_size=2)
    assert full().max_resident_blocks(split) == 32


def test_what_may_share_a_block_table():
    assert UniformTypeKVCacheSpecs.is_uniform_type({"a": full(2), "b": full(4)})
    assert full().is_uniform_with_collection({"a": full(4, 8)})
    apart = [
        full(),
        full(block_size=32),
        sliding(),
        sliding(window=65),
        mamba(),
        SinkFullAttentionSpec(
            block_size=16, num_kv_heads=2, head_size=4, dtype="float32", sink_len=4
        ),
    ]
    assert len({spec.group_key for spec in apart}) == len(apart)
    with pytest.raises(ConfigError, match="cannot share a block table"):
        UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full(), "b": sliding()})
    assert UniformTypeKVCacheSpecs.from_specs({"a": full(), "b": sliding()}) is None


def test_uniform_type_sums_pages():
    group = UniformTypeKVCacheSpecs.from_specs({"a": full(2), "b": full(4), "c": full(4)})
    assert group is not None
    assert group.page_size_bytes == 1024 + 2048 + 2048
    assert group.get_page_sizes() == {1024, 2048}
    assert group.get_num_layer_tuples() == 2
    assert group.manager_spec == full(2)
    larger = group.copy_with_new_block_size(32)
    assert larger.page_size_bytes == 2 * group.page_size_bytes


def test_merge_keeps_the_window_of_promoted_layers():
    merged = FullAttentionSpec.merge([full(), full(sliding_window=64), full()])
    assert isinstance(merged, FullAttentionSpec)
    assert merged.sliding_window == 64
    with pytest.raises(ConfigError, match="differ in kind or window"):
        FullAttentionSpec.merge([full(sliding_window=32), full(sliding_window=64)])
    with pytest.raises(ConfigError, match="differ"):
        SlidingWindowSpec.merge([sliding(2), sliding(4)])


def test_a_new_block_size_drops_a_padding():
    spec = full(page_size_padded=2048).copy_with_new_block_size(32)
    assert isinstance(spec, AttentionSpec)
    assert (spec.block_size, spec.page_size_padded) == (32, None)
