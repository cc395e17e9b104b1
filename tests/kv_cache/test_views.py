"""Where every element of every view lies, for all layouts, dense, padded, packed and split."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import Oracle, full, mamba, placed
from vllm.errors import ConfigError
from vllm.v1.kv_cache.grouping import page_room
from vllm.v1.kv_cache.views import (
    canonicalize_singleton_dim_strides,
    create_kv_cache_views,
    drop_head_dim,
    group_kernel_blocks,
    map_kv_caches_to_kernel_blocks,
    shares_storage,
    split_kv,
    state_views,
    strided_view,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

COMPACT = [layout for layout in KVCacheLayout if layout.is_block_compact]
WORD = 4


def ramp(size_bytes: int) -> torch.Tensor:
    """A backing in which the 4-byte word at address a holds a."""
    return torch.arange(0, size_bytes, WORD, dtype=torch.int32).view(torch.int8)


def check(view: torch.Tensor, oracle: Oracle, layer: int, kernel_blocks: int = 1) -> None:
    """Every element of the view is the word that the oracle says."""
    per_kernel = view.shape[2]
    for kernel_block, head, state, word in product(*map(range, view.shape)):
        block, part = divmod(kernel_block, kernel_blocks)
        address = oracle.address(layer, block, head, part * per_kernel + state, word * WORD)
        assert int(view[kernel_block, head, state, word]) == address


sizes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in "LBHN"})


@settings(max_examples=60, deadline=None)
@given(layout=st.sampled_from(KVCacheLayout), sizes=sizes, head_size=st.integers(1, 2))
def test_dense(layout, sizes, head_size):
    spec = full(sizes["H"], head_size, sizes["N"], dtype="int32")
    page = spec.page_size_bytes
    config = placed([{f"l.{i}": spec for i in range(sizes["L"])}], KVCacheLayout.LBHNC, 1)
    block_stride = {True: page, False: page // sizes["H"]}[layout.is_block_compact]
    layer_stride = page * sizes["B"]
    if layout.is_block_outermost:
        block_stride, layer_stride = page * sizes["L"], block_stride
    tensor = replace(
        config.kv_cache_tensors[0], layer_stride=layer_stride, block_stride=block_stride
    )
    raw = ramp(page * sizes["L"] * sizes["B"])
    views = create_kv_cache_views(raw, spec, sizes["B"], layout, tensor)
    oracle = Oracle(layout.value, {**sizes, "C": 2 * head_size * WORD})
    for layer, view in enumerate(views):
        check(view, oracle, layer)
    assert shares_storage([raw, *views])


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(COMPACT), sizes=sizes, head_size=st.integers(1, 2), pad=st.integers(1, 5)
)
def test_padded(layout, sizes, head_size, pad):
    dense = full(sizes["H"], head_size, sizes["N"], dtype="int32")
    room = dense.page_size_bytes + pad * 16
    spec = replace(dense, page_size_padded=room)
    tensor = placed([{f"l.{i}": spec for i in range(sizes["L"])}], layout, sizes["B"])
    raw = ramp(tensor.backing_size_bytes)
    views = create_kv_cache_views(raw, spec, sizes["B"], layout, tensor.kv_cache_tensors[0])
    layer_room = tensor.kv_cache_tensors[0].layer_stride
    block_room = tensor.bytes_per_block
    for layer, view in enumerate(views):
        if layout.is_block_outermost:
            oracle = Oracle(
                layout.value,
                {**sizes, "C": 2 * head_size * WORD},
                room=layer_room,
                block_room=block_room,
            )
            check(view, oracle, layer)
        else:
            assert layer_room >= room * sizes["B"]
            oracle = Oracle(layout.value, {**sizes, "L": 1, "C": 2 * head_size * WORD}, room=room)
            check(view - layer * layer_room, oracle, 0)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([KVCacheLayout.BLHNC, KVCacheLayout.BLNHC, KVCacheLayout.BHLNC]),
    sizes=sizes,
    head_size=st.integers(1, 2),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
def test_packed_beside_others(layout, sizes, head_size, before, after):
    """A tensor somewhere inside a block that other layers fill up."""
    spec = full(sizes["H"], head_size, sizes["N"], dtype="int32")
    content = spec.state_content_size_bytes
    inner = content * sizes["N"] if layout is KVCacheLayout.BHLNC else page_room(spec)
    own = page_room(spec) * sizes["L"]
    block_room = before * 16 + own + after * 16
    config = placed([{f"l.{i}": spec for i in range(sizes["L"])}], layout, sizes["B"])
    tensor = replace(
        config.kv_cache_tensors[0],
        offset=before * 16,
        block_stride=block_room,
        size=block_room * sizes["B"],
    )
    assert tensor.layer_stride == inner
    raw = ramp(tensor.size)
    oracle = Oracle(
        layout.value,
        {**sizes, "C": content},
        room=None if layout is KVCacheLayout.BHLNC else inner,
        block_room=block_room,
        before=before * 16,
    )
    for layer, view in enumerate(create_kv_cache_views(raw, spec, sizes["B"], layout, tensor)):
        check(view, oracle, layer)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([KVCacheLayout.LBHNC, KVCacheLayout.LBNHC]),
    sizes=sizes,
    ratio=st.integers(2, 4),
)
def test_split_into_kernel_blocks(layout, sizes, ratio):
    kernel = sizes["N"]
    spec = full(sizes["H"], 2, kernel * ratio, dtype="int32")
    config = placed([{f"l.{i}": spec for i in range(sizes["L"])}], layout, sizes["B"], (kernel,))
    raw = ramp(config.backing_size_bytes)
    tensor = config.kv_cache_tensors[0]
    views = create_kv_cache_views(raw, spec, sizes["B"], layout, tensor, kernel)
    oracle = Oracle(
        layout.value,
        {**sizes, "N": kernel * ratio, "C": 4 * WORD},
        room=spec.page_size_bytes,
        splits=ratio,
    )
    for layer, view in enumerate(views):
        assert view.shape == (sizes["B"] * ratio, sizes["H"], kernel, 4)
        check(view, oracle, layer, ratio)
        grouped = group_kernel_blocks(view, sizes["B"])
        assert grouped.shape[:2] == (sizes["B"], ratio)
        for block, part in product(range(sizes["B"]), range(ratio)):
            assert torch.equal(grouped[block, part], view[block * ratio + part])
        back = map_kv_caches_to_kernel_blocks({"l": grouped}, {"l": ratio})["l"]
        assert (back.stride(), back.shape) == (view.stride(), view.shape)
        assert shares_storage([raw, grouped, back])


@pytest.mark.parametrize("field", ["offset", "block_stride", "layer_stride"])
def test_the_oracle_notices_a_wrong_stride_or_offset(field):
    spec = full(2, 2, 3, dtype="int32")
    room = 256  # of a layer: 64 bytes more than its two pages, so that a mistake still fits
    tensor = placed([{"l.0": spec, "l.1": spec}], KVCacheLayout.LBHNC, 2).kv_cache_tensors[0]
    right = replace(tensor, layer_stride=room)
    wrong = replace(right, **{field: getattr(right, field) + WORD})
    raw = ramp(3 * room)
    oracle = Oracle("LBHNC", {"L": 1, "B": 2, "H": 2, "N": 3, "C": 4 * WORD})
    for layer, view in enumerate(create_kv_cache_views(raw, spec, 2, KVCacheLayout.LBHNC, right)):
        check(view - layer * room, oracle, 0)
    views = create_kv_cache_views(raw, spec, 2, KVCacheLayout.LBHNC, wrong)
    with pytest.raises(AssertionError):
        for layer, view in enumerate(views):
            check(view - layer * room, oracle, 0)


def test_a_view_outside_the_allocation_is_refused():
    spec = full(2, 2, 3, dtype="int32")
    config = placed([{"l.0": spec}], KVCacheLayout.LBHNC, 2)
    raw = ramp(config.backing_size_bytes - WORD)
    with pytest.raises(ConfigError, match=r"layer l\.0.*ends at byte"):
        create_kv_cache_views(raw, spec, 2, KVCacheLayout.LBHNC, config.kv_cache_tensors[0])


def test_an_address_that_the_dtype_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="not multiples of the 4 bytes"):
        strided_view(ramp(64), 2, (2, 2), (8, 4), torch.float32)


def test_a_view_of_a_backing_that_is_itself_a_slice():
    raw = ramp(64)[16:]
    view = strided_view(raw, 8, (2,), (4,), torch.int32)
    assert view.tolist() == [24, 28]


def test_k_and_v_are_views_of_the_packed_content():
    cache = torch.arange(2 * 3 * 4 * 10).view(2, 3, 4, 10)
    key, value = split_kv(cache, 6, 4)
    assert key.shape == (2, 4, 3, 6)
    assert value.shape == (2, 4, 3, 4)
    assert torch.equal(value[1, 2, 0], cache[1, 0, 2, 6:])
    assert shares_storage([cache, key, value])


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("room", [80, 96])
def test_states_are_cut_from_the_page_back_to_back(num_blocks, room):
    spec = mamba()
    raw = ramp(room * num_blocks)
    page = strided_view(raw, 0, (num_blocks, 1, 1, 80), (room, 80, 80, 1), torch.int8)
    conv, ssm = state_views(page, spec.shapes, spec.dtypes)
    assert conv.dtype is torch.bfloat16
    assert conv.shape == (num_blocks, 3, 8)
    assert ssm.shape == (num_blocks, 2, 4)
    assert ssm.stride() == (room // 4, 4, 1)
    assert conv.data_ptr() == page.data_ptr()
    words = ssm.view(torch.int32)
    for block, i, j in product(range(num_blocks), range(2), range(4)):
        assert int(words[block, i, j]) == block * room + 48 + (i * 4 + j) * 4


def test_a_packed_state_layer_reads_its_own_rows():
    """The page's offset and row stride count, also for a state layer."""
    state = mamba(block_size=16)
    config = placed([{"l.0": state, "l.1": state}], KVCacheLayout.BLHNC, 3)
    raw = ramp(config.backing_size_bytes)
    tensor = config.kv_cache_tensors[0]
    pages = create_kv_cache_views(raw, state, 3, KVCacheLayout.BLHNC, tensor)
    _, ssm = state_views(pages[1], state.shapes, state.dtypes)
    first = ssm.view(torch.int32)[:, 0, 0].tolist()
    assert first == [block * 160 + 80 + 48 for block in range(3)]


def test_a_state_that_does_not_fit_or_divide_is_refused():
    page = torch.zeros(2, 1, 1, 80, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"state 1.*ends at byte 112"):
        state_views(page, ((3, 8), (4, 4)), ("bfloat16", "float32"))
    with pytest.raises(ConfigError, match="state 1"):
        state_views(page, ((3, 3), (2, 4)), ("bfloat16", "float32"))
    with pytest.raises(ConfigError, match=r"\(B, 1, 1, page\)"):
        state_views(page.view(2, 80), ((3, 8),), ("bfloat16",))


def test_latent_layers_drop_the_head_axis_and_only_that():
    assert drop_head_dim(torch.zeros(1, 1, 1, 5)).shape == (1, 1, 5)
    with pytest.raises(ConfigError, match="latent"):
        drop_head_dim(torch.zeros(2, 2, 4, 5))


def test_kernel_blocks_that_do_not_fill_blocks_are_refused():
    with pytest.raises(ConfigError, match="multiple of the 2 blocks"):
        group_kernel_blocks(torch.zeros(5, 1, 1, 1), 2)


def test_singleton_axes_get_dense_strides():
    view = torch.zeros(64).as_strided((2, 1, 3, 4), (12, 7, 4, 1))
    canonical = canonicalize_singleton_dim_strides(view)
    assert canonical.stride() == (12, 12, 4, 1)
    assert canonical.data_ptr() == view.data_ptr()
