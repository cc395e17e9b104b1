"""Transfer plans through the in-memory port, byte by byte against an oracle of views."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, make_config, placed, sliding
from tests.kv_cache.test_rearrange import attention, gdn
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.distributed.kv_transfer.plan import plan_transfer
from vllm.distributed.kv_transfer.staging import RingPair, StagingRing, TableMovers, chunks_of
from vllm.distributed.kv_transfer.transport.memory import MemoryFabric, MemoryPort
from vllm.distributed.kv_transfer.transport.port import PortError
from vllm.entrypoints.cli.kv_plan import predict_transfer
from vllm.errors import ConfigError, KVTransferError
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.declare import kv_heads_of_rank
from vllm.v1.kv_cache.descriptors import CacheDescriptor, describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache.shards import heads_of_rank
from vllm.v1.kv_cache.views import state_views
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

HEADS = 4
CANARY = 0x55
LAYERS = ("l.0", "l.1", "l.2")


class Rank:
    """One rank's cache of three layers, registered with a port of its own."""

    def __init__(self, fabric, name, spec, layout, rows, tp_size, rank, extra=None):
        self.spec, self.rows = spec, rows
        groups = [dict.fromkeys(LAYERS, spec)]
        if extra is not None:
            groups.append({"s.0": extra})
        self.config = placed(groups, layout, 2 + max(rows))
        self.cache = allocate_kv_cache(self.config)
        self.cache.backing.fill_(CANARY)
        base = self.cache.backing.data_ptr()
        self.descriptor = describe(self.config, base)
        self.shard = Shard(tp_size=tp_size, rank=rank)
        self.heads = list(heads_of_rank(HEADS, tp_size, rank))
        self.port = MemoryPort(fabric, name)
        self.port.register([(base, self.cache.backing.numel())], "cpu")

    def content(self, layer, tokens):
        """Bytes of every (token, head slot) as ``(tokens, slots, bytes)``."""
        token = torch.arange(tokens)
        block = torch.tensor(self.rows)[token // self.spec.block_size]
        return self.cache[layer][block, :, token % self.spec.block_size].view(torch.int8)

    def fill(self, tokens):
        token = torch.arange(tokens)
        block = torch.tensor(self.rows)[token // self.spec.block_size]
        for layer in LAYERS:
            view = self.cache[layer]
            numbers = self.expected(layer, tokens).view(view.dtype)
            view[block, :, token % self.spec.block_size] = numbers

    def expected(self, layer, tokens):
        heads = self.heads
        if self.spec.num_heads % len(heads):
            heads = [0]
        token, slot = np.ix_(range(tokens), range(self.spec.num_heads))
        side, head = np.divmod(slot, len(heads))
        seed = (ord(layer[-1]) * 7 + token) * 16 + side * 8 + np.array(heads)[head]
        if isinstance(self.spec, MLAAttentionSpec):
            seed = seed * 0 + ord(layer[-1]) * 7 + token
        numbers = np.arange(self.spec.state_content_size_bytes) * 31 + seed[..., None] * 97
        return torch.from_numpy((numbers % 251 - 125).astype(np.int8))

    def absolute(self, rows):
        rows = rows.copy()
        rows[:, 0] += self.cache.backing.data_ptr()
        return rows

    def take_from(self, source, plan, rows, tokens, first=0, staged=False):
        name = self.port.connect(source.port.metadata())
        if staged:
            self.take_staged(name, source, plan, plan.units(*rows, tokens, first))
            return
        local = self.port.prepare(None, self.absolute(plan.rows("target")))
        remote = self.port.prepare(name, source.absolute(plan.rows("source")))
        units = plan.units(*rows, tokens, first)
        before = self.port.num_descriptors
        copy = self.port.read(
            local, plan.indices(units, "target"), remote, plan.indices(units, "source")
        )
        assert self.port.poll(copy)
        assert self.port.num_descriptors - before == plan.num_descriptors(units)
        assert sum(n for *_, n in copy.runs) == plan.num_bytes(units)

    def take_staged(self, name, source, plan, units):
        """Gather there, one run a chunk, scatter here; slots differ in size on the two sides."""
        size = 1 << max(table.bytes_per_unit for table in plan.tables).bit_length()
        rings = (
            StagingRing(source.cache.backing, 2, 2 * size),
            StagingRing(self.cache.backing, 3, size),
        )
        source.port.register([rings[0].region], "cpu")
        self.port.register([rings[1].region], "cpu")
        pair = RingPair(source=rings[0].shape, target=rings[1].shape)
        lists = (
            self.port.prepare(None, pair.rows("target")),
            self.port.prepare(name, pair.rows("source")),
        )
        movers = [TableMovers(table, torch.device("cpu")) for table in plan.tables]
        before = self.port.num_descriptors
        chunks = chunks_of(plan, [len(own) for own in units], pair.slot_bytes)
        for chunk in chunks:
            slots = rings[0].take(), rings[1].take()
            own = units[chunk.table]
            assert rings[0].gather(movers[chunk.table], chunk, own, slots[0]).poll()
            copy = self.port.read(
                lists[0],
                pair.granules("target", slots[1], chunk.num_bytes),
                lists[1],
                pair.granules("source", slots[0], chunk.num_bytes),
            )
            assert self.port.poll(copy)
            assert rings[1].scatter(movers[chunk.table], chunk, own, slots[1]).poll()
            for ring, slot in zip(rings, slots, strict=True):
                ring.give(slot)
        assert self.port.num_descriptors - before == len(chunks)
        assert sum(chunk.num_bytes for chunk in chunks) == plan.num_bytes(units)


def rows_of(tokens, block_size, first):
    return [first + 2 * i for i in range(-(-tokens // block_size))][::-1]


def transfer(kind, layouts, block_sizes, tp_sizes, tokens, first=0, staged=False):
    """Every rank of the target takes its share; then every byte is compared."""
    if kind == "latent":
        specs = [
            MLAAttentionSpec(block_size=size, num_kv_heads=1, head_size=6, dtype="float16")
            for size in block_sizes
        ]
    else:
        specs = [
            attention(size, kv_heads_of_rank(HEADS, tp), kind)
            for size, tp in zip(block_sizes, tp_sizes, strict=True)
        ]
    heads = None if kind == "latent" else HEADS
    fabric = MemoryFabric()
    rows = rows_of(tokens, block_sizes[0], 2), rows_of(tokens, block_sizes[1], 1)
    sources = [
        Rank(fabric, f"p{r}", specs[0], layouts[0], rows[0], tp_sizes[0], r)
        for r in range(tp_sizes[0])
    ]
    for source in sources:
        source.fill(tokens)
    for rank in range(tp_sizes[1]):
        target = Rank(fabric, f"d{rank}", specs[1], layouts[1], rows[1], tp_sizes[1], rank)
        for source in sources:
            if kind == "latent" and source.shard.rank:
                continue
            plan = plan_transfer(
                source.descriptor,
                target.descriptor,
                source.shard,
                target.shard,
                dict.fromkeys(LAYERS, heads),
            )
            if plan.tables:
                target.take_from(source, plan, ([rows[0]], [rows[1]]), tokens, first, staged)
        unit = min(block_sizes)
        start = first // unit * unit
        for layer in LAYERS:
            got = target.content(layer, tokens)
            assert torch.equal(got[start:], target.expected(layer, tokens)[start:]), layer
            assert (got[:start] == CANARY).all(), layer
        for block in set(range(target.config.num_blocks)) - set(rows[1]):
            assert all(
                (view[block].view(torch.int8) == CANARY).all() for view in target.cache.values()
            )


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["plain", "int8", "head groups", "latent"]),
    layouts=st.tuples(st.sampled_from(KVCacheLayout), st.sampled_from(KVCacheLayout)),
    block_sizes=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8])),
    tp_sizes=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    tokens=st.integers(1, 21),
    first=st.integers(0, 2),
    staged=st.booleans(),
)
def test_any_pair_of_caches_exchanges_the_right_bytes(
    kind, layouts, block_sizes, tp_sizes, tokens, first, staged
):
    start = min(first * 8, tokens - 1) // 8 * 8
    transfer(kind, layouts, block_sizes, tp_sizes, tokens, start, staged)


MATRIX = [
    (layouts, sizes, tps)
    for layouts in itertools.product(("LBHNC", "LBNHC", "BHLNC"), repeat=2)
    for sizes in itertools.product((16, 64), repeat=2)
    for tps in itertools.product((1, 2), repeat=2)
]


@pytest.mark.parametrize("staged", [False, True], ids=["by descriptors", "staged"])
@pytest.mark.parametrize("kind", ["plain", "int8", "latent"])
def test_every_combination_of_the_matrix_is_right_to_the_byte(kind, staged):
    for layouts, sizes, tps in MATRIX:
        transfer(kind, tuple(map(KVCacheLayout, layouts)), sizes, tps, 70, staged=staged)
    assert len(MATRIX) == 144


def plan_of(source, target, source_shard=None, target_shard=None, heads=HEADS):
    return plan_transfer(
        source,
        target,
        source_shard or Shard(),
        target_shard or Shard(),
        {layer.name: heads for layer in target.layers},
    )


def descriptor(spec, layout, blocks=9, layers=LAYERS):
    return describe(placed([dict.fromkeys(layers, spec)], KVCacheLayout(layout), blocks))


@pytest.mark.parametrize(
    ("layout", "whole", "half"),
    [("BHLNC", 1, 1), ("BLHNC", 1, 3), ("LBHNC", 3, 3), ("LBNHC", 3, 48)],
)
def test_a_block_takes_as_few_runs_as_its_layout_allows(layout, whole, half):
    spec = full(4, 4, 16)
    own = descriptor(spec, layout)
    assert [len(table.lanes) for table in plan_of(own, own).tables] == [whole]
    part = descriptor(full(2, 4, 16), layout)
    plan = plan_of(own, part, Shard(), Shard(tp_size=2, rank=1))
    assert [len(table.lanes) for table in plan.tables] == [half]


def test_neighbouring_blocks_are_one_run():
    own = descriptor(full(4, 4, 16), "LBHNC")
    plan = plan_of(own, own)
    units = plan.units([[3, 4, 5, 8]], [[1, 2, 3, 4]], 64)
    assert plan.num_descriptors(units) == 2 * 3
    assert len(plan.indices(units, "source")) == 4 * 3


def test_only_live_blocks_of_a_window_move():
    own = descriptor(sliding(4, 4, 32), "LBHNC", layers=("l.0",))
    plan = plan_of(own, own)
    (units,) = plan.units([[0, 5, 6, 7]], [[0, 0, 3, 4]], 64)
    assert units.source_blocks.tolist() == [6, 7] and units.target_blocks.tolist() == [3, 4]
    with pytest.raises(KVTransferError, match="given back blocks that are needed"):
        plan.units([[0, 0, 6, 7]], [[0, 2, 3, 4]], 64)


def test_groups_of_attention_and_states_move_together():
    fabric = MemoryFabric()
    ranks = []
    for name, tp, rank, row in (("p0", 1, 0, [3, 1]), ("d0", 2, 0, [2, 4]), ("d1", 2, 1, [2, 4])):
        spec = attention(4, kv_heads_of_rank(HEADS, tp), "plain")
        layout = KVCacheLayout.BLHNC
        ranks.append(Rank(fabric, name, spec, layout, row, tp, rank, extra=gdn(tp)))
    source, *targets = ranks
    source.fill(7)
    state = gdn(1)
    for view, seed in zip(
        state_views(source.cache["s.0"], state.shapes, state.dtypes), (1, 2), strict=True
    ):
        numbers = torch.arange(view[4].numel()).reshape(view[4].shape) * 3 + seed
        view[4].copy_(numbers)
    conv, ssm = (view[4] for view in state_views(source.cache["s.0"], state.shapes, state.dtypes))
    for target in targets:
        plan = plan_transfer(
            source.descriptor,
            target.descriptor,
            source.shard,
            target.shard,
            dict.fromkeys(LAYERS, HEADS),
        )
        target.take_from(source, plan, ([[3, 1], [4]], [[2, 4], [5]]), 7)
        for layer in LAYERS:
            assert torch.equal(target.content(layer, 7), target.expected(layer, 7))
        own = gdn(2)
        got = state_views(target.cache["s.0"], own.shapes, own.dtypes)
        rank = target.shard.rank
        rows = [part.chunk(2)[rank] for part in torch.split(conv, [8, 8, 32])]
        assert torch.equal(got[0][5], torch.cat(rows))
        assert torch.equal(got[1][5], ssm.chunk(2)[rank])


def test_a_descriptor_survives_the_wire_and_plans_the_same():
    own = descriptor(full(4, 4, 16), "BHLNC")
    again = CacheDescriptor.from_json(own.to_json())
    assert again == own
    assert plan_of(again, own) == plan_of(own, own)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -64},
        {"offset": 1 << 40},
        {"block_stride": 1 << 40},
        {"block_stride": -4096},
        {"num_states": 0},
        {"kernel_blocks_per_block": 0},
        {"head_stride": 1 << 40},
        {"content_bytes": 1},
        {"num_head_slots": 10**9},
        {"tokens_per_block": "sixteen"},
        {"head_axis": {"count": 1000, "stride": 4, "sides": 1}},
    ],
)
def test_a_descriptor_that_lies_is_refused(change):
    own = descriptor(full(4, 4, 16), "LBHNC")
    data = json.loads(own.to_json())
    for layer in data["layers"]:
        layer.update(change)
    with pytest.raises(KVTransferError):
        plan_of(CacheDescriptor.from_json(json.dumps(data)), own)


def test_block_ids_that_are_not_the_peers_are_refused():
    own = descriptor(full(4, 4, 16), "LBHNC")
    plan = plan_of(own, own)
    for row in ([9], [-1], [1 << 62], [1 << 63], [-1 << 70]):
        with pytest.raises(KVTransferError, match="block ids must be 0 to 8"):
            plan.units([row], [[1]], 16)
    with pytest.raises(KVTransferError, match="need 2 blocks of the source, which has 1"):
        plan.units([[1]], [[1, 2]], 32)
    with pytest.raises(KVTransferError, match="blocks of 0 groups, not of 1"):
        plan.units([], [[1]], 16)


def test_models_that_differ_are_refused_with_both_sides():
    own = descriptor(full(4, 4, 16), "LBHNC")
    with pytest.raises(KVTransferError, match="dtype is float32 here and bfloat16 there"):
        plan_of(descriptor(full(4, 4, 16, "bfloat16"), "LBHNC"), own)
    with pytest.raises(KVTransferError, match=r"layers on one side only: l\.2"):
        plan_of(descriptor(full(4, 4, 16), "LBHNC", layers=LAYERS[:2]), own)


def test_the_port_reaches_registered_memory_only():
    fabric = MemoryFabric()
    one, two = MemoryPort(fabric, "one"), MemoryPort(fabric, "two")
    memory = np.zeros(64, dtype=np.int8)
    two.register([(memory.ctypes.data, 64)], "cpu")
    one.connect(two.metadata())
    rows = np.array([[memory.ctypes.data, 16, 16, 4]], dtype=np.int64)
    one.prepare("two", rows)
    with pytest.raises(PortError, match="is not registered by two"):
        one.prepare("two", rows + np.array([[1, 0, 0, 0]]))
    with pytest.raises(PortError, match="is not registered by one"):
        one.prepare(None, rows)


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "BHLNC"])
def test_kv_plan_predicts_what_a_request_takes(layout):
    spec = full(4, 4, 16)
    config = placed([dict.fromkeys(LAYERS, spec)], KVCacheLayout(layout), 20)
    told = predict_transfer(config, make_config(max_model_len=128))
    own = describe(config)
    plan = plan_of(own, own)
    units = plan.units([[1, 3, 5, 7, 9, 11, 13, 15]], [[2, 4, 6, 8, 10, 12, 14, 16]], 128)
    assert told["transfer_descriptors"] == plan.num_descriptors(units)
    assert told["transfer_bytes"] == plan.num_bytes(units)
    assert told["transfer_regions"] == (3 if layout == "LBHNC" else 1)


@pytest.mark.parametrize(
    ("sizes", "rank", "aligned", "consumers"),
    [
        ((4, 2), 3, (1,), (1,)),
        ((2, 4), 1, (2, 3), (2, 3)),
        ((2, 2), 1, (1,), (1,)),
        ((1, 2), 0, (0, 1), (0, 1)),
    ],
)
def test_every_rank_is_told_by_somebody(sizes, rank, aligned, consumers):
    topology = TransferTopology(
        tp_rank=rank, tp_size=sizes[0], remote_tp_size=sizes[1], total_heads=(8,)
    )
    assert topology.aligned_ranks() == aligned
    assert topology.consumers() == consumers


@given(
    sizes=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    heads=st.sampled_from([(), (1,), (2,), (8,), (2, 8)]),
)
def test_who_tells_and_who_waits_agree(sizes, heads):
    told: dict[int, set[int]] = {rank: set() for rank in range(sizes[1])}
    for rank in range(sizes[0]):
        topology = TransferTopology(
            tp_rank=rank, tp_size=sizes[0], remote_tp_size=sizes[1], total_heads=heads
        )
        for other in topology.notified_ranks():
            told[other].add(rank)
    for rank, tellers in told.items():
        waiting = TransferTopology(
            tp_rank=rank, tp_size=sizes[1], remote_tp_size=sizes[0], total_heads=heads
        )
        assert tellers and tellers == set(waiting.consumers())


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 here and 2 there"):
        TransferTopology(tp_rank=0, tp_size=3, remote_tp_size=2)
