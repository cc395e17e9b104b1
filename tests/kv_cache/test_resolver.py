"""Layout, kernel blocks and grouping are decided once, and the decision says why."""

import pytest

from tests.kv_cache.helpers import full, make_config, mamba, sliding
from tests.kv_cache.test_grouping import hybrid, qwen3_next
from vllm.errors import ConfigError
from vllm.v1.kv_cache.resolver import (
    BackendConstraints,
    CacheMovement,
    resolve_layout,
    select_common_block_size,
)
from vllm.v1.kv_cache_interface import KVQuantMode, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

L = KVCacheLayout
UNIFORM = {f"l.{i}": full() for i in range(4)}
MIXED = hybrid(12, 4, full(4, 12), sliding(3, 12))
ANY_SIXTEEN = (MultipleOf(16),)
OURS = CacheMovement(connector="NixlConnector", takes_descriptors=True)


def reads(*layouts, sizes=ANY_SIXTEEN, backend="X"):
    return BackendConstraints(
        backend=backend, layouts=layouts or None, kernel_block_sizes=tuple(sizes)
    )


def for_all(specs, limit):
    return dict.fromkeys(specs, limit)


def test_nothing_moves():
    plan = resolve_layout(UNIFORM, make_config())
    assert plan.layout is L.LBHNC
    assert {item.layout for item in plan.rejected} == set(L) - {L.LBHNC}


def test_our_connectors_get_the_fewest_runs():
    assert resolve_layout(UNIFORM, make_config(), None, OURS).layout is L.BHLNC


def test_then_whole_blocks_where_pages_differ_or_backends_cannot():
    assert resolve_layout(MIXED, make_config(), None, OURS).layout is L.BLHNC
    limits = for_all(UNIFORM, reads(L.LBHNC, L.BLHNC))
    assert resolve_layout(UNIFORM, make_config(), limits, OURS).layout is L.BLHNC
    limits = for_all(UNIFORM, reads(L.LBHNC))
    assert resolve_layout(UNIFORM, make_config(), limits, OURS).layout is L.LBHNC


def test_an_outside_connector_that_states_nothing_gets_lbhnc():
    movement = CacheMovement(connector="LMCacheConnector")
    assert resolve_layout(UNIFORM, make_config(), None, movement).layout is L.LBHNC


def test_a_stated_preference_is_honoured():
    movement = CacheMovement(connector="X", layout=L.LBNHC)
    plan = resolve_layout(UNIFORM, make_config(), None, movement)
    assert plan.layout is L.LBNHC
    assert "connector X needs it" in plan.explain()


def test_or_refused_at_start():
    movement = CacheMovement(connector="X", layout=L.LBNHC)
    limits = for_all(UNIFORM, reads(L.LBHNC, backend="CPU_ATTN"))
    with pytest.raises(ConfigError, match=r"X needs.*LBNHC.*CPU_ATTN reads only LBHNC.*works: LB"):
        resolve_layout(UNIFORM, make_config(), limits, movement)


@pytest.mark.parametrize("name", ["NHD", "BLNHC", "LHBNC"])
def test_the_users_choice_is_taken(name):
    plan = resolve_layout(UNIFORM, make_config(kv_cache_layout=name))
    assert plan.layout is L.from_str(name)


def test_or_refused_with_what_works():
    with pytest.raises(ConfigError, match=r"VLLM_KV_CACHE_LAYOUT=BHLNC.*works:.*BLHNC"):
        resolve_layout(MIXED, make_config(kv_cache_layout="BHLNC"))
    movement = CacheMovement(connector="X", layout=L.LBNHC)
    with pytest.raises(ConfigError, match=r"HND contradicts connector X.*LBNHC"):
        resolve_layout(UNIFORM, make_config(kv_cache_layout="HND"), None, movement)


def test_no_layout_at_all():
    limits = {"l.0": reads(L.LBHNC, backend="A"), "l.1": reads(L.LBNHC, backend="B")}
    with pytest.raises(
        ConfigError, match=r"no KV cache layout serves.*backend B reads only.*backend A reads"
    ):
        resolve_layout(UNIFORM, make_config(), limits)


def test_packing_is_preferred_to_padding():
    """At rest and with mixed pages, pages side by side need no padding."""
    plan = resolve_layout(qwen3_next(), make_config(max_model_len=262_144))
    assert plan.layout is L.BLHNC
    assert any("padded" in item.reason for item in plan.rejected if item.layout is L.LBHNC)


def test_a_kernel_that_reads_small_blocks_only_makes_layers_compact():
    """Blocks of 544 tokens can be split in kernel blocks where nothing lies between them."""
    specs = qwen3_next()
    limit = reads(sizes=(16, 32), backend="FLASHINFER")
    limits = {name: limit for name, spec in specs.items() if spec.uses_slot_mapping}
    plan = resolve_layout(specs, make_config(max_model_len=262_144), limits)
    assert plan.layout is L.LBHNC
    kernels = {
        kernel
        for kernel, group in zip(plan.kernel_block_sizes, plan.grouping.groups, strict=True)
        if group.spec.uses_slot_mapping
    }
    assert kernels == {32}


def test_a_block_size_that_the_user_gave_is_kept():
    config = make_config(max_model_len=262_144, user_specified_block_size=True)
    plan = resolve_layout(qwen3_next(), config)
    assert {s.block_size for s in plan.grouping.specs.values() if s.uses_slot_mapping} == {16}


def test_splitting_needs_the_dense_page():
    limits = for_all(UNIFORM, reads(sizes=(16,)))
    specs = {name: full(block_size=64) for name in UNIFORM}
    plan = resolve_layout(specs, make_config(), limits)
    assert (plan.layout, plan.kernel_block_sizes) == (L.LBHNC, (16,))
    refused = {item.layout: item.reason for item in plan.rejected}
    for layout in (L.BLHNC, L.BLNHC, L.BHLNC, L.LHBNC):
        assert "split into 4 kernel blocks of 16" in refused[layout]
    padded = {name: full(block_size=64, page_size_padded=8192) for name in UNIFORM}
    with pytest.raises(ConfigError, match=r"layer l\.0.*padded from 4096 to 8192.*block-size 16"):
        resolve_layout(padded, make_config(), limits)


def test_padding_needs_a_layout_that_keeps_a_page_together():
    padded = {name: full(page_size_padded=2048) for name in UNIFORM}
    for name in ("LHBNC", "BHLNC"):
        with pytest.raises(ConfigError, match="padded from 1024 to 2048"):
            resolve_layout(padded, make_config(kv_cache_layout=name))
    assert resolve_layout(padded, make_config(), None, OURS).layout is L.BLHNC


def test_scales_apart_from_data_need_a_page_in_one_run():
    spec = full(4, 128, 16, "uint8", kv_quant_mode=KVQuantMode.NVFP4)
    specs = {"l.0": spec, "l.1": spec}
    assert resolve_layout(specs, make_config(), None, OURS).layout is L.BLHNC
    for name in ("LBNHC", "LHBNC", "BLNHC", "BHLNC"):
        with pytest.raises(ConfigError, match="scales apart from data"):
            resolve_layout(specs, make_config(kv_cache_layout=name))


def test_mixed_pages_are_refused_where_heads_lie_outside_the_page():
    for name in ("LHBNC", "BHLNC"):
        with pytest.raises(ConfigError, match="layers differ in"):
            resolve_layout(MIXED, make_config(kv_cache_layout=name))


def test_every_layers_own_backend_is_asked():
    """A model-private backend that reads one layout only decides for the whole model."""
    limits = {name: reads(L.LBHNC, L.LBNHC) for name in UNIFORM}
    limits["l.3"] = reads(L.LBNHC, backend="PRIVATE")
    assert resolve_layout(UNIFORM, make_config(), limits).layout is L.LBNHC


@pytest.mark.parametrize(
    ("manager", "options", "common"),
    [
        (64, [(MultipleOf(16),)], 64),
        (64, [(MultipleOf(16),), (16, 32)], 32),
        (48, [(16, 32), (MultipleOf(1),)], 16),
        (64, [(16, 32, 64), (MultipleOf(32),)], 64),
        (96, [(16, 32, 64), (MultipleOf(32),)], 32),
        (128, [], 128),
    ],
)
def test_common_block_size(manager, options, common):
    limits = [reads(sizes=sizes) for sizes in options]
    assert select_common_block_size(manager, limits) == common


def test_no_common_block_size_names_the_backends():
    limits = [reads(sizes=(16,), backend="A"), reads(sizes=(MultipleOf(32),), backend="B")]
    with pytest.raises(ConfigError, match=r"64 tokens.*--block-size.*A 16; B multiples of 32"):
        select_common_block_size(64, limits)


def test_the_plan_explains_itself():
    text = resolve_layout(
        hybrid(12, 4, full(), sliding()), make_config(max_model_len=8192), None, OURS
    ).explain()
    assert "KV cache layout BHLNC: NixlConnector moves blocks" in text
    assert "x sliding_window: blocks of 16 tokens (kernels read 16)" in text
    assert "0 wasted (0.0 %)" in text
    assert "not LHBNC: later in the order" in text


def test_state_layers_alone():
    plan = resolve_layout({"l.0": mamba(), "l.1": mamba()}, make_config())
    assert (plan.layout, plan.kernel_block_sizes) == (L.LBHNC, (4096,))
