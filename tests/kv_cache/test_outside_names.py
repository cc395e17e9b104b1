"""The names and signatures by which outside code calls the helpers; one implementation behind."""

import pytest
import torch

from tests.kv_cache.helpers import full, make_config, mamba, placed, sliding
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention_layer_base import LatentLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache import blocks as by_plan
from vllm.v1.kv_cache_interface import (
    MLAAttentionSpec,
    MultipleOf,
    compute_layer_kv_cache_shape_bytes,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker import utils
from vllm.v1.worker.utils import (
    AttentionGroup,
    KVBlockZeroer,
    KVCacheBlockCopy,
    bind_kv_cache,
    copy_kv_cache_blocks_inplace,
    prepare_kernel_block_sizes,
    select_common_block_size,
)


class Backend(AttentionBackend):
    sizes = (MultipleOf(16),)

    @staticmethod
    def get_name():
        return "SIXTEENS"

    @staticmethod
    def get_impl_cls():
        raise TypeError

    @staticmethod
    def get_builder_cls():
        raise TypeError

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec=None):
        return list(cls.sizes)


class Few(Backend):
    sizes = (16, 32, 64)


class Layer:
    kv_cache = None

    def bind_kv_cache(self, kv_cache):
        self.kv_cache = kv_cache


GROUPS = [{"l.0": full(), "l.1": full()}, {"l.2": sliding(), "l.3": mamba(block_size=16)}]


def filled(layout, kernel=()):
    config = placed([GROUPS[0], {"l.2": sliding()}], layout, 5, kernel)
    cache = allocate_kv_cache(config)
    cache.backing.copy_(torch.arange(cache.backing.numel()) % 127)
    return config, cache


@pytest.mark.parametrize("layout", KVCacheLayout)
def test_copying_by_views_is_copying_by_plan(layout):
    copies = [KVCacheBlockCopy(1, 3), KVCacheBlockCopy(2, 1)]
    config, first = filled(layout)
    _, second = filled(layout)
    by_plan.copy_kv_cache_blocks_inplace(first.backing, config, copies)
    copy_kv_cache_blocks_inplace(second, config.num_blocks, copies)
    assert torch.equal(first.backing, second.backing)
    _, third = filled(layout)
    copy_kv_cache_blocks_inplace(list(third.values()), config.num_blocks, copies)
    assert torch.equal(first.backing, third.backing)


@pytest.mark.parametrize(("layout", "kernel"), [("LBHNC", (8, 16)), ("BLHNC", ()), ("BHLNC", ())])
def test_zeroing_by_layers_is_zeroing_by_plan(layout, kernel):
    config, first = filled(KVCacheLayout(layout), kernel)
    _, second = filled(KVCacheLayout(layout), kernel)
    layers = {name: Layer() for name in second}
    bind_kv_cache(second, layers, [])
    groups = [
        AttentionGroup(Backend, list(group.layer_names), group.kv_cache_spec, index)
        for index, group in enumerate(config.kv_cache_groups)
    ]
    by_plan.KVBlockZeroer(first.backing, config).zero_block_ids([1, 4])
    KVBlockZeroer("cpu", groups, [16, 16], layers, config.num_blocks).zero_block_ids([1, 4])
    assert torch.equal(first.backing, second.backing)


def test_states_are_zeroed_through_the_layers_that_cut_them():
    spec = mamba()
    cache = allocate_kv_cache(placed([{"l.0": spec}], KVCacheLayout.LBHNC, 4))
    cache.backing.fill_(1)

    class State(Layer):
        def bind_kv_cache(self, kv_cache):
            from vllm.v1.kv_cache.views import state_views

            self.kv_cache = state_views(kv_cache, spec.shapes, spec.dtypes)

    layers = {"l.0": State()}
    bind_kv_cache(cache, layers, [])
    groups = [AttentionGroup(Backend, ["l.0"], spec, 0)]
    KVBlockZeroer("cpu", groups, [4096], layers, 4).zero_block_ids([2])
    assert not cache["l.0"][2].any()
    assert cache["l.0"][[0, 1, 3]].all()


def test_a_latent_layer_drops_the_head_axis_and_nothing_else():
    spec = MLAAttentionSpec(block_size=4, num_kv_heads=1, head_size=6, dtype="float16")
    cache = allocate_kv_cache(placed([{"l.0": spec}], KVCacheLayout.BLHNC, 1))

    class Latent(LatentLayerBase):
        def get_attn_backend(self):
            return Backend

        def get_kv_cache_spec(self, vllm_config):
            return spec

    layer, kept = Latent(), []
    bind_kv_cache(cache, {"l.0": layer}, kept)
    assert layer.kv_cache.shape == (1, 4, 6)
    assert layer.kv_cache.data_ptr() == cache["l.0"].data_ptr()
    assert kept[0] is cache["l.0"]


def test_common_block_sizes_by_backends():
    assert select_common_block_size(48, [Backend, Backend]) == 48
    assert select_common_block_size(128, [Backend, Few]) == 64
    with pytest.raises(ConfigError, match="multiples of 16"):
        select_common_block_size(24, [Backend, Few])


def test_planned_kernel_blocks_are_checked_against_backends():
    config = placed([{"l.0": full(block_size=32)}], KVCacheLayout.LBHNC, 3, (16,))
    group = AttentionGroup(Few, ["l.0"], config.kv_cache_groups[0].kv_cache_spec, 0)
    assert prepare_kernel_block_sizes(config) == [16]
    assert prepare_kernel_block_sizes(config, [[group]]) == [16]
    other = placed([{"l.0": full(block_size=48)}], KVCacheLayout.LBHNC, 3)
    with pytest.raises(ConfigError, match="SIXTEENS does not read kernel blocks of 48"):
        prepare_kernel_block_sizes(other, [[group]])


def test_an_allocation_is_told_the_plans_layout_or_refuses():
    config = placed([{"l.0": full()}], KVCacheLayout.LBHNC, 3)
    assert utils.allocate_kv_cache(config, "cpu", "HND", [16]).config is config
    with pytest.raises(ConfigError, match="NHD contradicts LBHNC"):
        utils.allocate_kv_cache(config, "cpu", "NHD")
    with pytest.raises(ConfigError, match=r"\[8\] contradict \[16\]"):
        utils.allocate_kv_cache(config, "cpu", None, [8])


def test_derived_properties_of_specs():
    spec = full(2, 4, 32, block_stride_alignment=MultipleOf(576))
    assert spec.block_stride_alignment == 576
    assert (spec.has_layer_views, spec.block_table_token_alignment) == (True, 32)
    config = make_config(max_model_len=4096, decode_context_parallel_size=4)
    assert full().max_resident_blocks(config) == 64
    assert full(dcp_sharded=False).max_resident_blocks(config) == 256
    assert compute_layer_kv_cache_shape_bytes(spec, 3, 16) == (6, 2, 16, 32)
    assert compute_layout_strides(spec, 3, 2, KVCacheLayout.LBHNC)[4] == 1


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_tensors_by_slot_are_cut_as_outside_runners_cut_them(layout):
    """One allocation a slot, all layers of ``shared_by`` in it; rows and columns where packed."""
    config, cache = filled(KVCacheLayout(layout))
    slots = config.tensors_by_slot()
    assert [slot.shared_by for slot in slots] == [["l.0", "l.2"], ["l.1"]]
    page = full().page_size_bytes
    starts = set()
    for slot in slots:
        first = cache[slot.shared_by[0]]
        assert all(cache[name].data_ptr() == first.data_ptr() for name in slot.shared_by)
        starts.add(first.data_ptr())
        if slot.block_stride:
            assert slot.size == cache.backing.numel()
            rows = cache.backing.view(config.num_blocks, slot.block_stride)
            mine = rows[:, slot.offset : slot.offset + page]
        else:
            assert (slot.size, slot.offset) == (5 * page, 0)
            start = first.data_ptr() - cache.backing.data_ptr()
            mine = cache.backing[start : start + slot.size].view(config.num_blocks, page)
        for block in range(config.num_blocks):
            assert mine[block].data_ptr() == first[block].data_ptr()
    assert len(starts) == 2


def test_heads_outside_the_page_have_no_tensor_by_slot():
    config, _ = filled(KVCacheLayout.BHLNC)
    with pytest.raises(ConfigError, match="use LBHNC, LBNHC, BLHNC or BLNHC"):
        config.tensors_by_slot()


def test_layers_may_get_other_tensors_than_the_runner():
    names = ["l.1", "l.0"]
    raw = {name: torch.zeros(1) for name in names}
    own = {name: torch.ones(1) for name in names}
    layers = {name: Layer() for name in names}
    runner = []
    groups = placed([{"l.0": full(), "l.1": full()}], KVCacheLayout.LBHNC, 2).kv_cache_groups
    bind_kv_cache(raw, layers, runner, kv_cache_groups=groups, layer_kv_caches=own)
    assert [id(tensor) for tensor in runner] == [id(raw["l.0"]), id(raw["l.1"])]
    assert all(layers[name].kv_cache is own[name] for name in names)
    utils.clear_layer_kv_caches(layers)
    assert all(layer.kv_cache.numel() == 0 for layer in layers.values())
    utils.bind_kv_cache_to_layers(raw, layers)
    assert all(layers[name].kv_cache is raw[name] for name in names)
    with pytest.raises(ConfigError, match=r"layers l\.0 have a cache group and no cache"):
        utils.bind_kv_cache_to_layers({"l.1": raw["l.1"]}, layers, kv_cache_groups=groups)
