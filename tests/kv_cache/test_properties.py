"""Any model, any layout: refused for a reason, or every byte is where the rules put it.

And checks of the checks: a stride, an offset, a padding or an overlap broken on purpose is found.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, make_config, placed, sliding
from tests.kv_cache.oracle import Rules, addresses_of, check_disjoint
from vllm.errors import ConfigError
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.declare import kv_heads_of_rank
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.planner import plan_kv_cache
from vllm.v1.kv_cache.resolver import BackendConstraints, resolve_layout
from vllm.v1.kv_cache.runs import regions, runs_by_layer
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

# Reasons for which a combination may be refused, and what must be true of it then.
REASONS = {
    r"neither divides|does not divide|cannot be shared out": lambda c: c.tp_size > 1,
    r"does not keep a page together": lambda c: c.layout in ("BHLNC", "LHBNC"),
    r"keeps scales apart": lambda c: c.has_fp4 and c.layout[2:] != "HNC",
    r"kernel blocks of \d+, but": lambda c: c.kernel is not None,
    r"no kernel block size": lambda c: c.kernel is not None,
    r"latent page of": lambda c: c.has_latent and c.layout[0] == "L",
    r"is not a multiple of the \d-byte": lambda c: True,
}


def states(tp_size, block_size):
    shapes = MambaStateShapeCalculator.mamba2(
        tp_size=tp_size,
        intermediate_size=16,
        n_groups=1,
        num_heads=8,
        head_dim=2,
        state_size=2,
        conv_kernel=3,
    )
    return MambaSpec(
        block_size=block_size,
        shapes=shapes.shapes,
        dtypes=("float16", "float32"),
        segments=shapes.segments,
        sharded_axes=shapes.sharded_axes,
    )


def layer(kind, heads, width, pad, block_size, tp_size):
    """The spec of one layer on one rank."""
    if kind == "state":
        spec = states(tp_size, 64)
        return replace(spec, page_size_padded=spec.page_size_bytes + 16 * pad) if pad else spec
    if kind == "latent":
        return MLAAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=4 * width, dtype="bfloat16"
        )
    own = kv_heads_of_rank(heads, tp_size)
    if kind == "even":
        return full(own, width, block_size, "float16")
    if kind == "int8":
        mode = KVQuantMode.INT8_PER_TOKEN_HEAD
        spec = full(own, 4 * width, block_size, "int8", kv_quant_mode=mode)
    elif kind == "fp4":
        spec = full(own, 16, block_size, "uint8", kv_quant_mode=KVQuantMode.NVFP4)
    elif kind == "window":
        spec = sliding(own, width, 8, block_size, dtype="float16")
    elif kind == "chunk":
        spec = ChunkedLocalAttentionSpec(
            block_size=block_size,
            num_kv_heads=own,
            head_size=width,
            dtype="float16",
            attention_chunk_size=16,
        )
    else:
        spec = full(own, width, block_size, "float16", head_size_v=width + 2)
    return replace(spec, page_size_padded=spec.page_size_bytes + 16 * pad) if pad else spec


KINDS = ("full", "window", "chunk", "state", "latent", "int8", "fp4")
LAYOUTS = [str(layout) for layout in KVCacheLayout]


@st.composite
def combinations(draw):
    """Two of three are drawn so that they are likely to work; the others anyhow."""
    layout = draw(st.sampled_from(LAYOUTS))
    anyhow = draw(st.sampled_from([False, False, True]))
    tp_size = draw(st.integers(1, 8) if anyhow else st.sampled_from([1, 2, 4, 8]))
    kinds = set(KINDS)
    if not anyhow:
        kinds -= {"latent"} if layout[0] == "L" else set()
        kinds -= {"fp4"} if layout[2:] != "HNC" else set()
        if layout in ("BHLNC", "LHBNC"):
            kinds = {"full", "window", "chunk"}
    heads, width = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([2, 4]))
    groups = []
    for _ in range(draw(st.integers(1, 6))):
        same = not anyhow and layout in ("BHLNC", "LHBNC")
        kind = draw(st.sampled_from(sorted(kinds)))
        if kind in ("full", "int8", "fp4") and not anyhow and draw(st.booleans()):
            kind = "window" if "window" in kinds else kind
        groups.append(
            {
                "kind": "even" if kind == "full" and same else kind,
                "heads": heads if same else draw(st.sampled_from([1, 2, 4, 6, 8])),
                "width": width if same else draw(st.sampled_from([2, 4])),
                "pad": 0 if same else draw(st.sampled_from([0, 0, 0, 1, 3])),
                "layers": draw(st.integers(1, 3)),
            }
        )
    block_size = draw(st.sampled_from([4, 8]))
    split = anyhow or (layout[0] == "L" and len(groups) == 1)
    return SimpleNamespace(
        groups=groups,
        layout=layout,
        tp_size=tp_size,
        block_size=block_size,
        kernel=draw(st.sampled_from([None, block_size // 2])) if split else None,
        keep_blocks=draw(st.booleans()),
        has_fp4=False,
        has_latent=False,
    )


def plan(combination):
    """The plan of the combination, or ConfigError."""
    specs = {}
    for number, group in enumerate(combination.groups):
        combination.has_fp4 |= group["kind"] == "fp4"
        combination.has_latent |= group["kind"] == "latent"
        spec = layer(
            group["kind"],
            group["heads"],
            group["width"],
            group["pad"],
            combination.block_size,
            combination.tp_size,
        )
        for i in range(group["layers"]):
            name = f"l.{number * 3 + i}"
            specs[name] = spec.with_layer_name(name)
    config = make_config(
        max_model_len=16,
        max_num_batched_tokens=16,
        kv_cache_layout=combination.layout,
        user_specified_block_size=combination.keep_blocks,
        enable_prefix_caching=False,
    )
    limits = {}
    if combination.kernel is not None:
        limit = BackendConstraints(backend="X", kernel_block_sizes=(combination.kernel,))
        limits = {name: limit for name, spec in specs.items() if spec.uses_slot_mapping}
    return plan_kv_cache(config, specs, 1 << 18, limits)


def shrink(config, num_blocks=3):
    """The same plan with a few blocks, so that every byte can be looked at."""
    groups = [
        {name: group.spec_of(name) for name in group.layer_names}
        for group in config.kv_cache_groups
    ]
    return groups, placed(groups, config.kv_cache_layout, num_blocks, config.kernel_block_sizes)


def check_plan(groups, config, tensors=None) -> None:
    """Views, owners, runs and regions of a plan against the rules.

    ``tensors`` replaces the plan's own: for breaking it on purpose.
    """
    if tensors is not None:
        config = replace(config, kv_cache_tensors=tensors)
    ratios = [
        config.kernel_blocks_per_block(i) if next(iter(g.values())).uses_slot_mapping else 1
        for i, g in enumerate(groups)
    ]
    rules = Rules(groups, str(config.kv_cache_layout), config.num_blocks, ratios)
    cache = allocate_kv_cache(config)
    assert cache.backing.numel() == rules.size_bytes
    seen = addresses_of(cache.backing, cache)
    pages = {}
    for group, layers in enumerate(groups):
        for name in layers:
            blocks = seen[name].reshape(config.num_blocks, ratios[group], *seen[name].shape[1:])
            for block in range(config.num_blocks):
                assert np.array_equal(blocks[block], rules.page(name, block)), (
                    f"{name}, block {block}: bytes are not where the rules put them"
                )
                spec = layers[name]
                # A state's view shows its padding too, which belongs to nobody.
                used = spec.unpadded_page_size_bytes if spec.state_table else None
                pages[group, name, block] = blocks[block][..., :used]
    check_disjoint(pages, rules.size_bytes)
    check_runs(config, pages)
    check_regions(config, pages)


def check_runs(config, pages) -> None:
    """Runs and descriptors name exactly the bytes of each page."""
    runs = runs_by_layer(config)
    described = {item.name: item for item in describe(config).layers}
    for (group, name, block), addresses in pages.items():
        owned = [np.arange(start, end) for run in runs[name] for start, end in run.intervals(block)]
        assert np.array_equal(np.sort(np.concatenate(owned)), np.unique(addresses))
        descriptor = described[name]
        assert descriptor.group == group
        for part, head, state in np.ndindex(addresses.shape[:3]):
            start = (
                descriptor.offset
                + block * descriptor.block_stride
                + part * descriptor.kernel_block_stride
                + head * descriptor.head_stride
                + state * descriptor.state_stride
            )
            assert addresses[part, head, state, 0] == start


def check_regions(config, pages) -> None:
    """Every page lies in a region that counts its layer; regions end where payload ends."""
    table = regions(config)
    payload = np.zeros(config.backing_size_bytes + 1, dtype=bool)
    covered = np.zeros(config.backing_size_bytes + 1, dtype=bool)
    for region in table:
        assert not covered[region.offset : region.offset + region.size_bytes].any()
        covered[region.offset : region.offset + region.size_bytes] = True
    for (group, name, _), addresses in pages.items():
        payload[addresses.ravel()] = True
        (home,) = [region for region in table if (group, name) in region.members]
        assert addresses.min() >= home.offset
        assert addresses.max() < home.offset + home.size_bytes
    assert (covered | ~payload).all()
    if config.kv_cache_layout.is_layer_compact:
        for region in table:
            assert payload[region.offset]
            assert payload[region.offset + region.size_bytes - 1]
    else:
        assert [(r.offset, r.size_bytes) for r in table] == [(0, config.backing_size_bytes)]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(combination=combinations())
def test_refused_with_a_reason_or_right_to_the_byte(combination):
    try:
        config = plan(combination)
    except ConfigError as error:
        reasons = [holds for text, holds in REASONS.items() if re.search(text, str(error))]
        assert reasons, str(error)
        assert any(holds(combination) for holds in reasons), str(error)
        return
    check_plan(*shrink(config))


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    heads=st.sampled_from([1, 2, 4, 8]),
    tp_size=st.integers(1, 8),
    layers=st.integers(1, 4),
    ratio=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
)
def test_uniform_models_are_refused_by_the_rules_only(
    layout, heads, tp_size, layers, ratio, padded
):
    """For one kind the rules say exactly which combinations work."""
    combination = SimpleNamespace(
        groups=[{"kind": "full", "heads": heads, "width": 2, "pad": int(padded), "layers": layers}],
        layout=layout,
        tp_size=tp_size,
        block_size=8,
        kernel=8 // ratio,
        keep_blocks=True,
        has_fp4=False,
        has_latent=False,
    )
    shared = heads % tp_size == 0 or tp_size % heads == 0
    own = max(1, heads // tp_size)
    together = layout not in ("BHLNC", "LHBNC") or own == 1
    works = shared and (not padded or together)
    if ratio > 1:
        works = works and layout[0] == "L" and together and not padded
    try:
        config = plan(combination)
    except ConfigError:
        assert not works
        return
    assert works
    check_plan(*shrink(config))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.lists(
        st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["full", "window", "chunk", "state", "latent", "int8"]),
                "heads": st.sampled_from([1, 2, 4, 8]),
                "width": st.sampled_from([2, 4, 16]),
                "pad": st.just(0),
                "layers": st.integers(1, 12),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    max_model_len=st.sampled_from([512, 8192, 65_536]),
)
def test_no_plan_needs_more_than_equal_pages_for_all_groups_would(groups, max_model_len):
    specs = {}
    for number, group in enumerate(groups):
        spec = layer(group["kind"], group["heads"], group["width"], 0, 16, 1)
        if group["kind"] == "state":
            spec = replace(spec, block_size=max_model_len)
        for i in range(group["layers"]):
            specs[f"l.{number * 12 + i}"] = spec
    config = make_config(max_model_len=max_model_len, max_num_batched_tokens=2048)
    found = resolve_layout(specs, config)
    assert found.grouping.compared_bytes <= found.compared_with_bytes


# The checks themselves: each of these plans is right, and wrong as soon as one number is changed.

PLANS = {
    "dense": ([{"l.0": full(2, 2, 4), "l.1": full(2, 2, 4)}], "LBHNC", ()),
    "dense, heads outside": ([{"l.0": full(2, 2, 4), "l.1": full(2, 2, 4)}], "LHBNC", ()),
    "padded": ([{f"l.{i}": full(2, 2, 4, page_size_padded=256) for i in range(2)}], "LBNHC", ()),
    "packed": (
        [{"l.0": full(3, 2, 4), "l.1": full(1, 2, 4)}, {"l.2": sliding(2, 2, 8, 4)}],
        "BLHNC",
        (),
    ),
    "packed, heads outside": ([{"l.0": full(2, 2, 4), "l.1": full(2, 2, 4)}], "BHLNC", ()),
    "split": ([{"l.0": full(2, 2, 8), "l.1": full(2, 2, 8)}], "LBHNC", (4,)),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plans_that_are_broken_below_are_right(name):
    groups, layout, kernel = PLANS[name]
    check_plan(groups, placed(groups, KVCacheLayout(layout), 3, kernel))


def broken(tensors, **changes):
    """The first tensor with other numbers."""
    first = tensors[0]
    values = {field: change(getattr(first, field)) for field, change in changes.items()}
    return [replace(first, **values), *tensors[1:]]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "change",
    [
        {"block_stride": lambda stride: stride + 32},
        {"block_stride": lambda stride: stride - 32},
        {"layer_stride": lambda stride: stride + 16},
        {"layer_stride": lambda stride: stride - 16},
        {"offset": lambda offset: offset + 16},
        {"offset": lambda offset: offset - 16},
    ],
    ids=["stride+", "stride-", "layer stride+", "layer stride-", "offset+", "offset-"],
)
def test_a_broken_stride_or_offset_is_found(name, change):
    groups, layout, kernel = PLANS[name]
    config = placed(groups, KVCacheLayout(layout), 3, kernel)
    if "layer_stride" in change and len(config.kv_cache_tensors[0].layers) == 1:
        # A layer alone has no next one: then the stride of blocks stands for it.
        change = {"block_stride": change["layer_stride"]}
    with pytest.raises((AssertionError, ConfigError)):
        check_plan(groups, config, broken(config.kv_cache_tensors, **change))


@pytest.mark.parametrize("name", ["dense", "padded", "packed", "split"])
def test_a_page_that_is_given_too_little_room_is_found(name):
    """Padding forgotten: the block stride is that of a smaller page."""
    groups, layout, kernel = PLANS[name]
    config = placed(groups, KVCacheLayout(layout), 3, kernel)
    spec = next(iter(groups[0].values()))
    less = broken(
        config.kv_cache_tensors, block_stride=lambda stride: stride - spec.page_size_bytes // 2
    )
    with pytest.raises((AssertionError, ConfigError)):
        check_plan(groups, config, less)


def test_layers_that_overlap_are_found():
    groups, layout, _ = PLANS["packed"]
    config = placed(groups, KVCacheLayout(layout), 3)
    first, second, other = config.kv_cache_tensors
    moved = [first, replace(second, offset=first.offset), other]
    with pytest.raises(AssertionError, match="not where the rules put them"):
        check_plan(groups, config, moved)
    # Also where nobody compares addresses: two owners of one byte are enough.
    cache = allocate_kv_cache(replace(config, kv_cache_tensors=moved))
    seen = addresses_of(cache.backing, cache)
    pages = {(0, name, block): seen[name][block] for name in ("l.0", "l.1") for block in range(3)}
    with pytest.raises(AssertionError, match="overlaps a layer of its group"):
        check_disjoint(pages, config.backing_size_bytes)


def test_blocks_that_overlap_are_found():
    """Blocks that are closer together than the largest group needs reach into the next one."""
    groups = [{"l.0": full(2, 2, 4), "l.1": full(2, 2, 4)}, {"l.2": sliding(2, 2, 8, 4)}]
    config = placed(groups, KVCacheLayout.BLHNC, 4)
    first, second = config.kv_cache_tensors
    wrong = [first, replace(second, block_stride=second.block_stride // 2)]
    cache = allocate_kv_cache(replace(config, kv_cache_tensors=wrong))
    seen = addresses_of(cache.backing, cache)
    pages = {
        (group, name, block): seen[name][block]
        for group, layers in enumerate(groups)
        for name in layers
        for block in range(4)
    }
    with pytest.raises(AssertionError, match=r"block \d overlaps another"):
        check_disjoint(pages, config.backing_size_bytes)


def test_a_wrong_head_order_is_found():
    """Views of one layout over the bytes of another."""
    groups, _, _ = PLANS["dense"]
    config = placed(groups, KVCacheLayout.LBHNC, 3)
    other = placed(groups, KVCacheLayout.LBNHC, 3)
    cache = allocate_kv_cache(replace(other, kv_cache_tensors=config.kv_cache_tensors))
    rules = Rules(groups, "LBHNC", 3)
    seen = addresses_of(cache.backing, cache)
    assert not np.array_equal(seen["l.0"][1][None], rules.page("l.0", 1))


def test_runs_and_regions_that_miss_a_byte_are_found():
    groups, layout, kernel = PLANS["packed"]
    config = placed(groups, KVCacheLayout(layout), 3, kernel)
    cache = allocate_kv_cache(config)
    seen = addresses_of(cache.backing, cache)
    pages = {(0, "l.0", 0): seen["l.0"][0][None]}
    check_runs(config, pages)
    short = {(0, "l.0", 0): pages[0, "l.0", 0][:, :-1]}
    with pytest.raises(AssertionError):
        check_runs(config, short)
    behind = {(0, "l.0", 0): pages[0, "l.0", 0] + config.backing_size_bytes}
    with pytest.raises((AssertionError, IndexError)):
        check_regions(config, behind)
