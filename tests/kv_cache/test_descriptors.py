"""A cache is what its descriptor says, and nothing is read from shapes."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.kv_cache.helpers import full, mamba, placed, sliding
from vllm.errors import KVTransferError
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.blocks import RunZeroer
from vllm.v1.kv_cache.descriptors import CacheDescriptor, HeadAxis, content_differences, describe
from vllm.v1.kv_cache.runs import block_runs
from vllm.v1.kv_cache_interface import KVQuantMode
from vllm.v1.kv_cache_layout import KVCacheLayout


@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_the_descriptor_and_the_view_agree_on_every_address(layout):
    config = placed([{f"l.{i}": full(3, 2, 4) for i in range(2)}], layout, 3)
    cache = allocate_kv_cache(config)
    base = cache.backing.data_ptr()
    descriptor = describe(config, base)
    for name, view in cache.items():
        layer = descriptor.layer(name)
        for block, head, state in product(range(3), range(3), range(4)):
            address = (
                descriptor.base
                + layer.offset
                + block * layer.block_stride
                + head * layer.head_stride
                + state * layer.state_stride
            )
            assert view[block, head, state].data_ptr() == address


def test_kernel_blocks_have_their_own_stride():
    config = placed([{"l.0": full(block_size=64)}], KVCacheLayout.LBHNC, 3, (16,))
    view = allocate_kv_cache(config)["l.0"]
    layer = describe(config, view.data_ptr()).layers[0]
    assert (layer.tokens_per_block, layer.num_head_slots) == (64, 2)
    assert (layer.kernel_blocks_per_block, layer.num_states) == (4, 16)
    assert layer.block_stride == 4 * layer.kernel_block_stride
    assert (
        view[7].data_ptr() - view.data_ptr() == layer.block_stride + 3 * layer.kernel_block_stride
    )


def test_two_heads_do_not_look_like_k_and_v():
    """The same bytes a block, three meanings: only the descriptor tells them apart."""
    packed = full(2, 8, 16, "uint8")
    groups = full(1, 16, 16, "uint8", num_head_slots=2, state_content_bytes=16)
    assert packed.page_size_bytes == groups.page_size_bytes
    one, other = (
        describe(placed([{"l.0": spec}], KVCacheLayout.LBHNC, 2)) for spec in (packed, groups)
    )
    assert one.layers[0].head_axis == HeadAxis(count=2, stride=256)
    assert other.layers[0].head_axis == HeadAxis(count=1, stride=256, sides=2)
    assert any("content_format" in text for text in content_differences(one, other))
    assert one.fingerprint() != other.fingerprint()


def test_json_is_canonical_and_comes_back():
    groups = [{"l.0": full(), "l.1": full()}, {"l.2": mamba(), "l.3": mamba()}]
    descriptor = describe(placed(groups, KVCacheLayout.BLHNC, 4), 4096)
    text = descriptor.to_json()
    assert CacheDescriptor.from_json(text) == descriptor
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert descriptor.layer("l.2").states[1].offset == 48
    assert descriptor.layer("l.2").head_axis is None
    assert descriptor.layer("l.2").tokens_per_state == "-1"


def test_the_fingerprint_leaves_the_address_out():
    config = placed([{"l.0": full()}], KVCacheLayout.LBHNC, 4)
    assert describe(config, 1 << 20).fingerprint() == describe(config).fingerprint()
    larger = placed([{"l.0": full()}], KVCacheLayout.LBHNC, 5)
    assert describe(larger).fingerprint() != describe(config).fingerprint()


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 1, "layers": 3}'])
def test_what_is_no_descriptor_is_refused(text):
    with pytest.raises(KVTransferError, match="not a cache descriptor"):
        CacheDescriptor.from_json(text)


def test_another_version_is_refused():
    descriptor = describe(placed([{"l.0": full()}], KVCacheLayout.LBHNC, 4))
    text = replace(descriptor, version=2).to_json()
    with pytest.raises(KVTransferError, match=r"version 2.*reads 1"):
        CacheDescriptor.from_json(text)


def test_sizes_may_differ_between_peers_meaning_may_not():
    mine = describe(placed([{"l.0": full(4, 8)}], KVCacheLayout.LBHNC, 4))
    other_tp = describe(placed([{"l.0": full(2, 8, 32)}], KVCacheLayout.BHLNC, 9))
    assert content_differences(mine, other_tp) == []
    for spec, word in [
        (full(4, 8, dtype="bfloat16"), "dtype"),
        (full(4, 16), "parts"),
        (sliding(4, 8), "kind"),
        (full(4, 8, dtype="uint8", kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD), "k_scale"),
        (mamba(), "states"),
    ]:
        other = describe(placed([{"l.0": spec}], KVCacheLayout.LBHNC, 4))
        assert any(word in text and "l.0" in text for text in content_differences(mine, other))
    stranger = describe(placed([{"x": full(4, 8)}], KVCacheLayout.LBHNC, 4))
    assert content_differences(mine, stranger) == ["no layer has the same name on both sides"]


def test_state_order_is_part_of_the_meaning():
    sd, ds = (
        describe(placed([{"l.0": mamba(conv_state_layout=order)}], KVCacheLayout.LBHNC, 4))
        for order in ("SD", "DS")
    )
    assert content_differences(sd, ds) == ["l.0: state_layout is SD here and DS there"]


def test_spans_are_payload_and_pages_are_room():
    config = placed([{"l.0": full(page_size_padded=2048)}], KVCacheLayout.LBHNC, 4)
    layer = describe(config).layers[0]
    assert (layer.span_bytes, layer.page_bytes, layer.block_stride) == (1024, 2048, 2048)
    assert torch.tensor([run.length * run.count for run in layer.runs]).sum() == 1024


@pytest.mark.parametrize("layout", KVCacheLayout)
def test_a_descriptor_is_enough_to_zero_and_copy(layout):
    """What came over the wire names the same bytes as the plan it was made from."""
    groups = [{"l.0": full(), "l.1": full()}, {"l.2": sliding(), "l.3": sliding()}]
    config = placed(groups, layout, 4)
    received = CacheDescriptor.from_json(describe(config).to_json())
    for group in (None, 0, 1):
        assert received.group_runs(group) == block_runs(config, group)
    cache = allocate_kv_cache(config)
    cache.backing.fill_(1)
    RunZeroer(cache.backing, received.group_runs(1), received.num_blocks).zero_block_ids([2])
    assert not cache["l.2"][2].any()
    assert not cache["l.3"][2].any()
    assert cache["l.2"][1].all()
