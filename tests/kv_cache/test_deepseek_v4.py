"""Compressed latents, windows, indexers and compressor states of a model packed into blocks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kv_cache.helpers import make_config, placed
from tests.kv_cache.oracle import addresses_of, check_disjoint
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention_layer_base import LatentLayerBase
from vllm.model_executor.models.cache_declarations import declare_kv_caches
from vllm.transformers_utils.hf_config import fill_in_config
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.grouping import kinds_of, page_room
from vllm.v1.kv_cache.planner import plan_kv_cache
from vllm.v1.kv_cache.runs import block_runs, regions
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import bind_kv_cache

CONFIG = Path(__file__).parents[1] / "fixtures" / "configs" / "deepseek-v4-like.json"


def latent(**kw):
    return MLAAttentionSpec(
        block_size=256,
        num_kv_heads=1,
        head_size=512,
        dtype="uint8",
        cache_dtype_str="fp8_ds_mla",
        model_version="deepseek_v4",
        compress_ratio=4,
        alignment=576,
        **kw,
    )


def model(num_layers=43, max_model_len=131_072):
    values = json.loads(CONFIG.read_text())
    values["num_hidden_layers"] = num_layers
    hf_config = fill_in_config(values)
    base = make_config(max_model_len=max_model_len, max_num_batched_tokens=2048)
    config = replace(
        base,
        model_config=replace(
            base.model_config,
            hf_config=hf_config,
            hf_text_config=hf_config,
            architecture="DeepseekV4ForCausalLM",
        ),
    )
    return config, declare_kv_caches(config)


class Layer(LatentLayerBase):
    def get_attn_backend(self):
        raise TypeError("only bound")

    def get_kv_cache_spec(self, vllm_config):
        raise TypeError("only bound")


def test_pages_of_every_cache():
    _, specs = model(4)
    pages = {name.split("attn.")[1]: spec.page_size_bytes for name, spec in specs.items()}
    compressed = {spec.compress_ratio: spec for spec in specs.values() if spec.compress_ratio > 1}
    assert pages["swa_cache"] == 37_440
    assert pages["indexer.k_cache"] == 8_448
    assert pages["compressor.state_cache"] == 32_832
    assert (compressed[4].num_states, compressed[128].num_states) == (64, 2)
    assert [s.page_size_bytes for s in specs.values() if s.compress_ratio == 128] == [1_728]
    assert [s.page_size_bytes for n, s in specs.items() if n.endswith("2.attn.mla_cache")] == [
        37_440
    ]


def test_four_layers_side_by_side_in_a_block():
    names = [f"model.layers.{i}.attn" for i in range(4)]
    config = placed([{name: latent() for name in names}], KVCacheLayout.BLHNC, 100)
    assert config.bytes_per_block == 149_760
    (tensor,) = config.kv_cache_tensors
    assert (tensor.offset, tensor.layer_stride, tensor.block_stride) == (0, 37_440, 149_760)
    cache = allocate_kv_cache(config)
    start = cache.backing.data_ptr()
    layers, kept = {name: Layer() for name in names}, []
    bind_kv_cache(cache, layers, kept)
    for index, (name, offset) in enumerate(zip(names, (0, 37_440, 74_880, 112_320), strict=True)):
        view = layers[name].kv_cache
        assert view.shape == (100, 64, 584)
        assert view.stride() == (149_760, 584, 1)
        assert view.data_ptr() - start == offset
        assert kept[index].shape == (100, 1, 64, 584)
    assert [(region.offset, region.size_bytes) for region in regions(config)] == [(0, 14_976_000)]
    # One copy a block: the gaps that alignment leaves go along.
    (run,) = block_runs(config, 0, bridge_gaps=True)
    assert (run.count, run.length) == (1, 112_320 + 64 * 584)


def test_groups_overlaid_need_fewer_bytes_a_block_than_all_side_by_side():
    config, specs = model()
    plan = plan_kv_cache(config, specs, 8 << 30)
    side_by_side = sum(page_room(spec) for spec in specs.values())
    assert plan.kv_cache_layout is KVCacheLayout.BLHNC
    assert plan.bytes_per_block == 998_208
    assert side_by_side == 4_126_272
    assert plan.bytes_per_block < side_by_side / 4
    assert len(regions(plan)) == 1
    # Each kind is a group or several; the full ones are one, as they need blocks for every token.
    full = [
        g
        for g in plan.kv_cache_groups
        if isinstance(g.kv_cache_spec.manager_spec, MLAAttentionSpec)
    ]
    assert [len(group.layer_names) for group in full] == [62]
    assert len(kinds_of(specs)) == 4


def test_a_layer_compact_layout_is_refused_with_the_one_that_works():
    config, specs = model(6)
    config = replace(config, cache_config=replace(config.cache_config, kv_cache_layout="HND"))
    works = r"HND cannot be used.*cannot be padded.*what works: BLHNC"
    with pytest.raises(ConfigError, match=works):
        plan_kv_cache(config, specs, 8 << 30)


def test_every_byte_of_the_packed_caches_has_one_owner():
    config, specs = model(6, 512)
    planned = plan_kv_cache(config, specs, 8 << 30)
    groups = [
        {name: group.spec_of(name) for name in group.layer_names}
        for group in planned.kv_cache_groups
    ]
    small = placed(groups, planned.kv_cache_layout, 3)
    cache = allocate_kv_cache(small)
    seen = addresses_of(cache.backing, cache)
    pages = {
        (small.group_of(name), name, block): addresses[block]
        for name, addresses in seen.items()
        for block in range(3)
    }
    check_disjoint(pages, small.backing_size_bytes)
    used = np.unique(np.concatenate([page.ravel() for page in pages.values()]))
    runs = [
        np.arange(*span) for run in block_runs(small) for b in range(3) for span in run.intervals(b)
    ]
    assert np.array_equal(used, np.sort(np.concatenate(runs)))


def test_a_window_and_its_compressor_states_are_forgotten_at_their_own_pace():
    _, specs = model(4)
    config = make_config(max_model_len=8192)
    windows = {name: spec for name, spec in specs.items() if isinstance(spec, SlidingWindowMLASpec)}
    held = {(s.block_size, s.sliding_window): s.blocks_at(8192, config) for s in windows.values()}
    assert held == {(64, 128): 2, (4, 8): 2, (8, 128): 16}


def test_compressed_states_are_written_and_read_through_strides():
    config = placed([{f"l.{i}": latent() for i in range(3)}], KVCacheLayout.BLHNC, 4)
    cache = allocate_kv_cache(config)
    for index, name in enumerate(("l.0", "l.1", "l.2")):
        cache[name][2, 0, 63] = index + 1
    for index, name in enumerate(("l.0", "l.1", "l.2")):
        assert (cache[name][2, 0, 63] == index + 1).all()
        assert int(torch.count_nonzero(cache[name])) == 584


def test_narrow_latents_are_kept_as_they_are_and_never_packed():
    config, _ = model(4)
    hf_config = config.model_config.hf_config
    narrow = fill_in_config({**hf_config.to_dict(), "head_dim": 64})
    model_config = replace(config.model_config, hf_config=narrow, hf_text_config=narrow)
    plain = replace(config, model_config=model_config)
    dtypes = {spec.storage_dtype for spec in declare_kv_caches(plain).values()}
    assert dtypes == {"bfloat16", "float32"}
    packed = replace(plain, cache_config=replace(plain.cache_config, cache_dtype="fp8_ds_mla"))
    with pytest.raises(ConfigError, match="packs latents of 512, this model's have 64: use auto"):
        declare_kv_caches(packed)
    other = replace(plain, cache_config=replace(plain.cache_config, cache_dtype="nvfp4"))
    with pytest.raises(ConfigError, match="nvfp4 is not for compressed latents"):
        declare_kv_caches(other)
