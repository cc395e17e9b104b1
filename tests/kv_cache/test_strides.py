"""Byte strides against the conformance vectors and against nested boxes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kv_cache.helpers import Oracle, full, mamba
from vllm.errors import ConfigError
from vllm.v1.kv_cache.strides import (
    compute_layer_kv_cache_shape_bytes,
    compute_layout_strides,
    kernel_blocks_per_block,
)
from vllm.v1.kv_cache_layout import KVCacheLayout


@pytest.mark.parametrize(
    ("layout", "strides"),
    [
        ("LBHNC", (360, 120, 30, 6, 1)),
        ("LBNHC", (360, 120, 6, 24, 1)),
        ("LHBNC", (360, 30, 90, 6, 1)),
        ("BLHNC", (120, 240, 30, 6, 1)),
        ("BLNHC", (120, 240, 6, 24, 1)),
        ("BHLNC", (30, 240, 60, 6, 1)),
    ],
)
def test_conformance_vector(layout, strides):
    """L=2, B=3, H=4, N=5, C=6."""
    spec = full(heads=4, head_size=3, block_size=5, dtype="int8")
    assert compute_layer_kv_cache_shape_bytes(spec, 3) == (3, 4, 5, 6)
    assert compute_layout_strides(spec, 3, 2, KVCacheLayout(layout)) == strides


@given(
    layout=st.sampled_from(KVCacheLayout),
    sizes=st.fixed_dictionaries({axis: st.integers(1, 4) for axis in "LBHN"}),
    head_size=st.integers(1, 3),
    data=st.data(),
)
def test_dense_strides_are_nested_boxes(layout, sizes, head_size, data):
    spec = full(sizes["H"], head_size, sizes["N"], dtype="int8")
    strides = compute_layout_strides(spec, sizes["B"], sizes["L"], layout)
    oracle = Oracle(layout.value, {**sizes, "C": 2 * head_size})
    index = [data.draw(st.integers(0, n - 1)) for n in (*sizes.values(), 2 * head_size)]
    assert sum(i * s for i, s in zip(index, strides, strict=True)) == oracle.address(*index)


def test_a_fixed_stride_moves_what_lies_outside_it():
    spec = full(heads=4, head_size=3, block_size=5, dtype="int8")
    fixed = (None, 128, None, None, None)
    assert compute_layout_strides(spec, 3, 2, KVCacheLayout.LBHNC, None, fixed) == (
        384,
        128,
        30,
        6,
        1,
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stride_smaller_than_what_is_inside_is_refused(axis):
    spec = full(heads=4, head_size=3, block_size=5, dtype="int8")
    fixed = [None] * 5
    fixed[axis] = 119
    with pytest.raises(ConfigError, match="smaller than"):
        compute_layout_strides(spec, 3, 2, KVCacheLayout.LBHNC, None, fixed)


def test_layers_may_share_bytes_on_purpose():
    spec = full(heads=4, head_size=3, block_size=5, dtype="int8")
    fixed = (0, 120, None, None, None)
    assert compute_layout_strides(spec, 3, 2, KVCacheLayout.LBHNC, None, fixed)[0] == 0


def test_kernel_blocks_of_a_manager_block():
    spec = full(block_size=64)
    assert kernel_blocks_per_block(spec, 16) == 4
    assert kernel_blocks_per_block(spec, None) == 1
    assert kernel_blocks_per_block(mamba(), 16) == 1
    with pytest.raises(ConfigError, match="multiple of 48"):
        kernel_blocks_per_block(spec, 48)


def test_split_divides_the_block_stride():
    spec = full(heads=4, head_size=3, block_size=4, dtype="int8")
    strides = compute_layout_strides(spec, 3, 2, KVCacheLayout.LBHNC, 2)
    assert strides == (288, 48, 12, 6, 1)


@pytest.mark.parametrize("layout", ["LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_split_is_refused_where_kernel_blocks_are_not_equidistant(layout):
    spec = full(heads=4, block_size=64, dtype="int8", layer_name="model.layers.3.attn")
    with pytest.raises(ConfigError, match=r"model.layers.3.attn.*64 tokens.*--block-size 16"):
        compute_layout_strides(spec, 3, 2, KVCacheLayout(layout), 16)


def test_split_of_a_padded_page_names_page_and_stride():
    spec = full(heads=1, head_size=1, block_size=64, dtype="int8")
    with pytest.raises(ConfigError, match=r"160 bytes is not the dense page of 128.*"):
        compute_layout_strides(spec, 3, 2, KVCacheLayout.LBHNC, 16, (None, 160, None, None, None))
