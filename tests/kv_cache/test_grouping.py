"""Grouping: few groups, little waste, and specs changed only where nothing else works."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, make_config, mamba, sliding
from vllm.errors import ConfigError
from vllm.v1.kv_cache.grouping import (
    group_packed,
    group_with_equal_pages,
    page_room,
    promote_to_full,
    unify_kv_cache_spec_page_size,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    UniformTypeKVCacheSpecs,
)


def hybrid(num_layers, every, rare, common):
    return {f"l.{i}": rare if i % every == every - 1 else common for i in range(num_layers)}


def qwen3_next():
    """Attention H=2, D=256 bf16 (2,048 bytes a token) beside states of 1,097,728 bytes."""
    state = mamba(((3, 8192), (32, 128, 128)), ("bfloat16", "bfloat16"), block_size=262_144)
    return hybrid(48, 4, full(2, 256, 16, "bfloat16"), state)


def test_one_kind_is_one_group():
    grouping = group_packed({f"l.{i}": full() for i in range(5)}, make_config())
    assert [len(group.layer_names) for group in grouping.groups] == [5]
    assert grouping.groups[0].spec == full()
    assert grouping.bytes_per_block == 5 * 1024


def test_one_kind_with_different_pages_is_one_group_without_padding():
    specs = hybrid(6, 3, full(8), full(2))
    grouping = group_with_equal_pages(specs, make_config())
    assert len(grouping.groups) == 1
    assert isinstance(grouping.groups[0].spec, UniformTypeKVCacheSpecs)
    assert grouping.bytes_per_block == sum(spec.page_size_bytes for spec in specs.values())
    assert grouping.specs == specs


def test_windowed_layers_are_cut_to_the_size_of_full_ones():
    """5 windowed layers to each full one, equal pages: no byte is wasted."""
    specs = hybrid(60, 6, full(), sliding())
    config = make_config(max_model_len=32_768)
    for grouping in (group_packed(specs, config), group_with_equal_pages(specs, config)):
        assert [len(group.layer_names) for group in grouping.groups] == [10] * 6
        assert grouping.bytes_per_block == 10 * 1024
        assert grouping.notes == ()


def test_layers_of_a_kind_are_dealt_in_turn():
    specs = hybrid(4, 2, full(), sliding())
    config = make_config(max_model_len=128, max_num_batched_tokens=64)
    names = [group.layer_names for group in group_packed(specs, config).groups]
    assert sorted(name for group in names for name in group) == sorted(specs)


def test_pages_of_two_sizes_lie_side_by_side_without_padding():
    """Full layers with twice the page: half as many of them in a block."""
    specs = hybrid(60, 6, full(4), sliding(2))
    config = make_config(max_model_len=32_768)
    grouping = group_packed(specs, config)
    assert grouping.specs == specs
    sizes = {
        group.spec.manager_spec.kind.value: len(group.layer_names) for group in grouping.groups
    }
    assert sizes["sliding_window"] > 1.5 * sizes["full_attention"]
    payload = sum(spec.payload_bytes_at(8192, config) for spec in specs.values())
    assert payload > 0.98 * grouping.compared_bytes


def test_attention_blocks_grow_to_meet_a_state_page():
    """Conformance: 544 tokens a block and 1.5 % padding where every layer is one stretch."""
    grouping = group_with_equal_pages(qwen3_next(), make_config(max_model_len=262_144))
    blocks = {spec.block_size for spec in grouping.specs.values() if spec.uses_slot_mapping}
    assert blocks == {544}
    assert {spec.page_size_bytes for spec in grouping.specs.values()} == {1_114_112}
    assert [len(group.layer_names) for group in grouping.groups] == [12] * 4
    assert grouping.padded


def test_packing_states_needs_smaller_blocks_and_no_padding():
    config = make_config(max_model_len=262_144)
    grouping = group_packed(qwen3_next(), config, lambda specs: True)
    equal = group_with_equal_pages(qwen3_next(), config)
    blocks = {spec.block_size for spec in grouping.specs.values() if spec.uses_slot_mapping}
    assert max(blocks) < 544
    assert not grouping.padded
    assert len(grouping.groups) <= 8
    assert grouping.bytes_of_mix <= equal.bytes_of_mix * 1.05


def test_blocks_grow_only_to_sizes_that_kernels_read():
    config = make_config(max_model_len=262_144)

    def accepts(specs):
        return all(s.block_size in (16, 32, 64) for s in specs.values() if s.uses_slot_mapping)

    grouping = group_packed(qwen3_next(), config, accepts)
    assert accepts(grouping.specs)
    fixed = group_packed(qwen3_next(), config)
    assert fixed.specs == qwen3_next()


def test_aligned_states_keep_the_attention_block_size():
    state = mamba(((3, 8192), (32, 128, 128)), ("bfloat16", "bfloat16"), block_size=16)
    state = replace(state, mamba_cache_mode="align")
    specs = hybrid(8, 4, full(2, 256, 16, "bfloat16"), state)
    grouping = group_packed(specs, make_config(), lambda specs: True)
    assert len({spec.block_size for spec in grouping.specs.values()}) == 1


def test_unify_follows_its_rules():
    large, half, odd = full(4), sliding(2), sliding(3, window=32)
    config = make_config()
    specs, notes = unify_kv_cache_spec_page_size({"a": large, "b": half, "c": odd}, config)
    assert {spec.page_size_bytes for spec in specs.values()} == {2048}
    assert specs["b"].block_size == 32
    assert specs["c"].block_size == 16
    assert any("padded from 1536 to 2048" in note for note in notes)
    fixed, _ = unify_kv_cache_spec_page_size({"a": large, "b": half}, config, False)
    assert fixed["b"].block_size == 16
    assert fixed["b"].page_size_bytes == 2048


def test_a_page_is_scaled_or_padded_whichever_needs_less():
    """7 heads beside 16: two blocks of 7 and a padding of 2, rather than a padding of 9."""
    specs, notes = unify_kv_cache_spec_page_size({"a": full(16), "b": sliding(7)}, make_config())
    assert specs["b"].block_size == 32
    assert specs["b"].page_size_padded == specs["a"].page_size_bytes
    assert any("enlarged 2 times" in note for note in notes)
    # A window of one block: larger blocks would only hold tokens that nobody reads.
    tiny = sliding(1, window=2, block_size=16)
    short_steps = make_config(max_num_batched_tokens=8)
    specs, _ = unify_kv_cache_spec_page_size({"a": full(4), "b": tiny}, short_steps)
    assert specs["b"].block_size == 16
    # Kernels that read blocks of 16 only can't be given a padded block of 32.
    specs, _ = unify_kv_cache_spec_page_size(
        {"a": full(16), "b": sliding(7)},
        make_config(),
        True,
        lambda specs: all(spec.block_size == 16 for spec in specs.values()),
    )
    assert specs["b"].block_size == 16


def test_a_latent_page_is_never_padded():
    latent = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=9, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"cannot be padded to the 1024.*BLHNC"):
        unify_kv_cache_spec_page_size({"a": full(), "b": latent}, make_config())


def test_without_the_hybrid_manager_windows_are_kept_whole():
    chunked = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=4, dtype="float32", attention_chunk_size=32
    )
    specs = promote_to_full({"a": full(), "b": sliding(), "c": chunked})
    assert all(type(spec) is FullAttentionSpec for spec in specs.values())
    assert specs["b"].sliding_window == 64
    assert specs["c"].attention_chunk_size == 32
    latent = SlidingWindowMLASpec(
        block_size=64, num_kv_heads=1, head_size=8, dtype="int8", sliding_window=9, alignment=576
    )
    promoted = promote_to_full({"a": latent})["a"]
    assert isinstance(promoted, MLAAttentionSpec)
    assert promoted.page_size_bytes == latent.page_size_bytes
    with pytest.raises(ConfigError, match="disable-hybrid-kv-cache-manager"):
        promote_to_full({"a": full(), "b": mamba()})


@settings(max_examples=50, deadline=None)
@given(
    specs=st.lists(
        st.one_of(
            st.builds(full, heads=st.integers(1, 4)),
            st.builds(sliding, heads=st.integers(1, 4), window=st.sampled_from([32, 64])),
            st.builds(mamba, page_size_padded=st.sampled_from([None, 96, 4096])),
        ),
        min_size=1,
        max_size=12,
    ),
    max_model_len=st.sampled_from([64, 1024, 100_000]),
)
def test_every_layer_is_in_one_group_that_fits_the_block(specs, max_model_len):
    named = {f"l.{i}": spec for i, spec in enumerate(specs)}
    config = make_config(max_model_len=max_model_len)
    for grouping in (
        group_packed(named, config, lambda specs: True),
        group_packed(named, config),
        group_with_equal_pages(named, config),
    ):
        members = [name for group in grouping.groups for name in group.layer_names]
        assert sorted(members) == sorted(named)
        for group in grouping.groups:
            own = [grouping.specs[name] for name in group.layer_names]
            assert len({spec.group_key for spec in own}) == 1
            assert sum(map(page_room, own)) <= grouping.bytes_per_block
