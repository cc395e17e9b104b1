"""Blocks to a contiguous buffer and back; received blocks set right in place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, mamba, placed, sliding
from vllm.distributed.kv_transfer.kv_connector.utils import (
    kv_postprocess_blksize_and_layout_on_receive,
    kv_postprocess_blksize_on_receive,
    kv_postprocess_layout_on_receive,
)
from vllm.errors import KVTransferError
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.pack import BlockPacker
from vllm.v1.kv_cache.runs import block_runs
from vllm.v1.kv_cache_layout import KVCacheLayout

PACKED = [KVCacheLayout.BLHNC, KVCacheLayout.BLNHC]
RECEIVERS = [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, *PACKED]


def random_cache(groups, layout, num_blocks):
    config = placed(groups, layout, num_blocks)
    cache = allocate_kv_cache(config)
    cache.backing.copy_(torch.randint(-128, 128, cache.backing.shape, dtype=torch.int8))
    return config, cache


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(KVCacheLayout),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    blocks=st.permutations(range(5)).map(lambda ids: ids[:3]),
)
def test_gathered_bytes_are_the_runs_and_come_back(layout, layers, heads, blocks):
    groups = [{f"l.{i}": full(heads, 3, 4, "float16") for i in range(layers)}]
    config, cache = random_cache(groups, layout, 5)
    packer = BlockPacker(cache.backing, describe(config), 0)
    packed = packer.gather(blocks)
    for row, block in zip(packed, blocks, strict=True):
        bytes_of_block = torch.cat(
            [
                cache.backing[start:end]
                for run in block_runs(config, 0)
                for start, end in run.intervals(block)
            ]
        )
        assert torch.equal(row, bytes_of_block)
    before = cache.backing.clone()
    cache.backing.fill_(7)
    packer.scatter(packed, blocks)
    for run in block_runs(config, 0):
        for block in range(5):
            for start, end in run.intervals(block):
                kept = before[start:end] if block in blocks else torch.full((end - start,), 7)
                assert torch.equal(cache.backing[start:end], kept.to(torch.int8))


def test_only_the_groups_own_bytes_are_touched():
    wide, narrow = {"l.0": full(3, 4, 4)}, {"l.1": sliding(1, 4, 8, 4), "l.2": sliding(1, 4, 8, 4)}
    config, cache = random_cache([wide, narrow], KVCacheLayout.BLHNC, 4)
    packer = BlockPacker(cache.backing, describe(config), 1)
    assert packer.bytes_per_block == 2 * narrow["l.1"].page_size_bytes
    before = cache.backing.clone()
    packer.scatter(torch.zeros((1, packer.bytes_per_block), dtype=torch.int8), [2])
    changed = (cache.backing != before).nonzero().flatten()
    allowed = {
        byte for run in block_runs(config, 1) for a, b in run.intervals(2) for byte in range(a, b)
    }
    assert set(changed.tolist()) <= allowed


def test_state_pages_are_packed_without_their_padding():
    config, cache = random_cache([{"l.0": mamba(page_size_padded=96)}], KVCacheLayout.LBHNC, 3)
    packer = BlockPacker(cache.backing, describe(config), 0)
    assert packer.bytes_per_block == 80
    assert torch.equal(packer.gather([2])[0], cache["l.0"][2, 0, 0, :80])


def test_a_buffer_of_another_size_is_refused():
    config, cache = random_cache([{"l.0": full()}], KVCacheLayout.LBHNC, 3)
    packer = BlockPacker(cache.backing, describe(config), 0)
    with pytest.raises(KVTransferError, match="2 packed blocks is int8"):
        packer.scatter(torch.zeros((1, packer.bytes_per_block), dtype=torch.int8), [0, 1])
    with pytest.raises(KVTransferError, match=r"not torch\.uint8"):
        packer.gather([0], torch.zeros((1, packer.bytes_per_block), dtype=torch.uint8))


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("layout", RECEIVERS)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_received_blocks_are_set_right(layout, order, parts, num_blocks):
    """Raw bytes of a peer's pages, in its order and block size, as a transfer leaves them."""
    heads, tokens, width = 3, 8, 4
    spec = full(heads, width // 2, tokens, "int32")
    config = placed([{"l.0": spec, "l.1": spec}], layout, num_blocks)
    cache = allocate_kv_cache(config)
    view = cache["l.1"]
    wanted = torch.arange(view.numel(), dtype=torch.int32).view(view.shape)
    page = torch.empty(spec.page_size_bytes, dtype=torch.int8)
    ids = list(range(num_blocks))[::-1]
    for block in ids:
        pieces = wanted[block].split(tokens // parts, dim=1)
        if order == "NHD":
            pieces = [piece.transpose(0, 1) for piece in pieces]
        page = torch.cat([piece.flatten() for piece in pieces])
        flat = view[block].as_strided((page.numel(),), (1,), view[block].storage_offset())
        flat.copy_(page)
    other = cache["l.0"].clone()
    if parts == 1 and order == "HND":
        kv_postprocess_layout_on_receive(view, ids)
    elif order == "HND":
        kv_postprocess_blksize_and_layout_on_receive(view, ids, parts)
    else:
        kv_postprocess_blksize_on_receive(view, torch.tensor(ids), parts, order)
    assert torch.equal(view, wanted)
    assert torch.equal(cache["l.0"], other)


@pytest.mark.parametrize("layout", RECEIVERS)
def test_smaller_blocks_in_our_own_order(layout):
    heads, tokens = 2, 4
    spec = full(heads, 1, tokens, "int32")
    view = allocate_kv_cache(placed([{"l.0": spec}], layout, 3))["l.0"]
    wanted = torch.arange(view.numel(), dtype=torch.int32).view(view.shape)
    own = "NHD" if layout.head_layout_name == "NHD" else "HND"
    for block in range(3):
        pieces = wanted[block].split(2, dim=1)
        if own == "NHD":
            pieces = [piece.transpose(0, 1) for piece in pieces]
        flat = view[block].as_strided((view[block].numel(),), (1,), view[block].storage_offset())
        flat.copy_(torch.cat([piece.flatten() for piece in pieces]))
    kv_postprocess_blksize_on_receive(view, [0, 1, 2], 2)
    assert torch.equal(view, wanted)


def test_pages_that_are_not_kept_together_are_refused():
    for layout in (KVCacheLayout.BHLNC, KVCacheLayout.LHBNC):
        view = allocate_kv_cache(placed([{"l.0": full(), "l.1": full()}], layout, 3))["l.0"]
        with pytest.raises(KVTransferError, match="not kept together"):
            kv_postprocess_blksize_on_receive(view, [0], 2)
    view = allocate_kv_cache(placed([{"l.0": full()}], KVCacheLayout.LBHNC, 3))["l.0"]
    with pytest.raises(KVTransferError, match="16 tokens are not 3 whole blocks"):
        kv_postprocess_blksize_on_receive(view, [0], 3)
    with pytest.raises(KVTransferError, match="HND or NHD"):
        kv_postprocess_blksize_on_receive(view, [0], 2, "BLHNC")
