"""Copies between caches of other layout, block size, kernel blocks and head shard."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, placed
from vllm.errors import KVTransferError
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.declare import kv_heads_of_rank
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.rearrange import (
    Shard,
    copy_units,
    copy_units_by_kernel,
    copy_units_indexed,
    plan_layer_copy,
    units_of_rows,
)
from vllm.v1.kv_cache.shards import heads_of_rank
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator
from vllm.v1.kv_cache.views import state_views
from vllm.v1.kv_cache_interface import KVQuantMode, MambaSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

HEADS = 4
CANARY = 0x55
COPIERS = [copy_units, copy_units_indexed, copy_units_by_kernel]


def attention(block_size, heads, kind):
    if kind == "int8":
        return full(heads, 4, block_size, "int8", kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)
    if kind == "head groups":
        return full(heads, 4, block_size, num_head_slots=2 * heads, state_content_bytes=16)
    return full(heads, 2, block_size, "float16", head_size_v=3)


class Side:
    """One rank's cache of two layers, filled with numbers that name token, head and byte."""

    def __init__(self, spec, layout, rows, tokens, kernel=None):
        kernels = (kernel,) if kernel else ()
        blocks = 1 + max(rows)
        self.config = placed([{"l.0": spec, "l.1": spec}], layout, blocks, kernels)
        self.cache = allocate_kv_cache(self.config)
        self.cache.backing.fill_(CANARY)
        self.rows, self.tokens, self.spec = rows, tokens, spec
        self.descriptor = describe(self.config)
        self.kernel = kernel or spec.block_size

    def at(self, layer, token, slot):
        """Bytes of one (token, head slot)."""
        block, inside = divmod(token, self.spec.block_size)
        part, state = divmod(inside, self.kernel)
        ratio = self.spec.block_size // self.kernel
        view = self.cache[layer]
        return view[self.rows[block] * ratio + part, slot, state].view(torch.int8)

    def fill(self, heads):
        for layer in ("l.0", "l.1"):
            for token in range(self.tokens):
                for slot in range(self.spec.num_heads):
                    self.at(layer, token, slot).copy_(value(layer, token, slot, heads, self.spec))


def value(layer, token, slot, heads, spec):
    """``heads``: global numbers of this rank's heads; sides count on behind them."""
    side, head = divmod(slot, len(heads))
    seed = (ord(layer[-1]) * 7 + token) * 16 + side * 8 + heads[head]
    numbers = torch.arange(spec.state_content_size_bytes) * 31 + seed * 97
    return (numbers % 251 - 125).to(torch.int8)


def rows_of(tokens, block_size, first):
    return [first + 2 * i for i in range(-(-tokens // block_size))][::-1]


@settings(max_examples=60, deadline=None)
@given(
    layouts=st.tuples(st.sampled_from(KVCacheLayout), st.sampled_from(KVCacheLayout)),
    block_sizes=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8])),
    splits=st.tuples(st.booleans(), st.booleans()),
    tp_sizes=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    kind=st.sampled_from(["plain", "int8", "head groups"]),
    copier=st.sampled_from(COPIERS),
    rank=st.integers(0, 7),
)
def test_tokens_and_heads_arrive_where_they_belong(
    layouts, block_sizes, splits, tp_sizes, kind, copier, rank
):
    tokens = 11
    from_tp, to_tp = tp_sizes
    rank %= to_tp
    specs = [
        attention(size, kv_heads_of_rank(HEADS, tp), kind)
        for size, tp in zip(block_sizes, tp_sizes, strict=True)
    ]
    kernels = [
        size // 2 if split and layout.is_block_compact and layout.is_layer_compact else None
        for size, split, layout in zip(block_sizes, splits, layouts, strict=True)
    ]
    target = Side(specs[1], layouts[1], rows_of(tokens, block_sizes[1], 1), tokens, kernels[1])
    for peer in range(from_tp):
        source = Side(specs[0], layouts[0], rows_of(tokens, block_sizes[0], 2), tokens, kernels[0])
        source.fill(list(heads_of_rank(HEADS, from_tp, peer)))
        for theirs, mine in zip(source.descriptor.layers, target.descriptor.layers, strict=True):
            plan = plan_layer_copy(
                theirs,
                mine,
                Shard(tp_size=from_tp, rank=peer),
                Shard(tp_size=to_tp, rank=rank),
                HEADS,
            )
            if plan is not None:
                units = units_of_rows(plan, source.rows, target.rows, tokens)
                copier(plan, source.cache.backing, target.cache.backing, units)
    expected = Side(specs[1], layouts[1], target.rows, tokens, kernels[1])
    expected.fill(list(heads_of_rank(HEADS, to_tp, rank)))
    for layer in ("l.0", "l.1"):
        for token in range(tokens):
            for slot in range(specs[1].num_heads):
                assert torch.equal(target.at(layer, token, slot), expected.at(layer, token, slot))
    # Whatever is not of these blocks was left alone.
    used = set(target.rows)
    for block in set(range(target.config.num_blocks)) - used:
        ratio = specs[1].block_size // target.kernel
        for view in target.cache.values():
            rest = view[block * ratio : (block + 1) * ratio].view(torch.int8)
            assert (rest == CANARY).all()


def test_a_copy_takes_as_few_boxes_as_the_layouts_allow():
    spec = full(4, 4, 16)
    same = describe(placed([{"l.0": spec}], KVCacheLayout.LBHNC, 3)).layers[0]
    plan = plan_layer_copy(same, same)
    assert [(box.counts, box.length) for box in plan.boxes] == [((), spec.page_size_bytes)]
    # A range of heads is one run where heads lie outside tokens, on both sides.
    half = describe(placed([{"l.0": replace(spec, num_kv_heads=2)}], KVCacheLayout.BHLNC, 3))
    plan = plan_layer_copy(same, half.layers[0], Shard(), Shard(tp_size=2, rank=1), 4)
    assert [(box.counts, box.length) for box in plan.boxes] == [((), spec.page_size_bytes // 2)]
    assert plan.boxes[0].source_offset == spec.page_size_bytes // 2


def test_a_latent_is_copied_whole_whatever_the_ranks():
    latent = MLAAttentionSpec(block_size=4, num_kv_heads=1, head_size=6, dtype="float16")
    cache = describe(placed([{"l.0": latent}], KVCacheLayout.LBHNC, 2)).layers[0]
    plan = plan_layer_copy(cache, cache, Shard(tp_size=4, rank=2), Shard(tp_size=2, rank=1), 1)
    assert plan.bytes_per_unit == latent.page_size_bytes


def gdn(tp_size, order="DS"):
    shapes = MambaStateShapeCalculator.gdn_attention(
        tp_size=tp_size, num_k_heads=4, num_v_heads=8, head_k_dim=2, head_v_dim=4, conv_kernel=4
    ).in_order(order)
    return MambaSpec(
        block_size=64,
        shapes=shapes.shapes,
        dtypes=("bfloat16", "float32"),
        mamba_type="gdn_attention",
        conv_state_layout=order,
        segments=shapes.segments,
        sharded_axes=shapes.sharded_axes,
    )


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize(("from_tp", "to_tp"), [(1, 1), (1, 2), (2, 1), (4, 2), (2, 4)])
def test_states_are_cut_by_projection_and_head_never_by_page(from_tp, to_tp, copier):
    """The conv rows of one rank are Q, K and V rows of the model; a page's half is none of that."""
    whole_conv = torch.arange(4 * 2 * 2 + 8 * 4)[:, None] * 10 + torch.arange(3)
    whole_state = torch.arange(8 * 4 * 2, dtype=torch.float32).view(8, 4, 2)
    q_k_v = torch.split(whole_conv, [8, 8, 32])

    def expected(tp_size, rank):
        conv = torch.cat([part.chunk(tp_size)[rank] for part in q_k_v])
        return conv.to(torch.bfloat16), whole_state.chunk(tp_size)[rank]

    def side(tp_size, padded):
        spec = gdn(tp_size)
        if padded:
            spec = replace(spec, page_size_padded=spec.page_size_bytes + 64)
        config = placed([{"l.0": spec}], KVCacheLayout.BLHNC, 4)
        cache = allocate_kv_cache(config)
        return (
            describe(config).layers[0],
            cache,
            state_views(cache["l.0"], spec.shapes, spec.dtypes),
        )

    for rank in range(to_tp):
        mine, cache, (conv, state) = side(to_tp, False)
        for peer in range(from_tp):
            theirs, source, (their_conv, their_state) = side(from_tp, True)
            for view, numbers in zip(
                (their_conv, their_state), expected(from_tp, peer), strict=True
            ):
                view[2].copy_(numbers)
            plan = plan_layer_copy(
                theirs, mine, Shard(tp_size=from_tp, rank=peer), Shard(tp_size=to_tp, rank=rank)
            )
            if plan is not None:
                units = units_of_rows(plan, [1, 2], [3], 40)
                copier(plan, source.backing, cache.backing, units)
        conv_wanted, state_wanted = expected(to_tp, rank)
        assert torch.equal(conv[3], conv_wanted)
        assert torch.equal(state[3], state_wanted)


def test_refused_copies_say_why():
    def layer(spec, layout=KVCacheLayout.LBHNC):
        return describe(placed([{"l.0": spec}], layout, 2)).layers[0]

    two, one = Shard(tp_size=2), Shard()
    with pytest.raises(KVTransferError, match=r"l\.0: .*dtype is float32 here and bfloat16 there"):
        plan_layer_copy(layer(full(dtype="bfloat16")), layer(full()))
    fp4 = full(2, 32, 16, "uint8", kv_quant_mode=KVQuantMode.NVFP4)
    with pytest.raises(KVTransferError, match="scales apart from data, so it moves whole"):
        plan_layer_copy(layer(fp4), layer(replace(fp4, block_size=32)))
    with pytest.raises(KVTransferError, match="not cut by head"):
        plan_layer_copy(layer(fp4), layer(replace(fp4, num_kv_heads=1)), one, two, 2)
    with pytest.raises(KVTransferError, match="number of the model's heads is needed"):
        plan_layer_copy(layer(full(2)), layer(full(1)), one, two)
    with pytest.raises(KVTransferError, match="VLLM_SSM_CONV_STATE_LAYOUT=DS"):
        plan_layer_copy(layer(gdn(1, "SD")), layer(gdn(2, "SD")), one, two)
    with pytest.raises(KVTransferError, match="state_layout is DS here and SD there"):
        plan_layer_copy(layer(gdn(1, "SD")), layer(gdn(1, "DS")))
    nameless = [layer(replace(gdn(tp), segments=())) for tp in (1, 2)]
    with pytest.raises(KVTransferError, match="do not say how ranks share them out"):
        plan_layer_copy(*nameless, one, two)


def test_only_the_units_of_the_asked_tokens_move():
    spec = full(1, 2, 8)
    layer = describe(placed([{"l.0": spec}], KVCacheLayout.LBHNC, 9)).layers[0]
    plan = plan_layer_copy(layer, layer)
    assert units_of_rows(plan, [4, 5, 6], [1, 2, 3], 24, 8) == [(5, 0, 2, 0), (6, 0, 3, 0)]
    assert units_of_rows(plan, [4, 5, 6], [1, 2, 3], 17, 16) == [(6, 0, 3, 0)]
