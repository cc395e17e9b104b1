"""Parallel linear layers: each rank loads its part, and the parts together are the whole."""

from contextlib import contextmanager

import pytest
import torch

from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.weight_loading import WeightShapeError


@contextmanager
def seen_from(rank, size):
    """Layers built here are rank ``rank``'s of ``size``; nothing is sent."""
    previous = parallel_state._tp
    parallel_state._tp = GroupCoordinator(ranks=tuple(range(size)), rank_in_group=rank)
    try:
        yield
    finally:
        parallel_state._tp = previous


def load(layer, name, tensor, shard_id=None):
    param = getattr(layer, name)
    param.weight_loader(param, tensor, shard_id)


def test_replicated():
    layer = ReplicatedLinear(8, 6, bias=True)
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(3, 8)
    load(layer, "weight", weight)
    load(layer, "bias", bias)
    layer.process_weights_after_loading()
    output, rest = layer(x)
    assert rest is None
    torch.testing.assert_close(output, x @ weight.T + bias)


def test_packing_leaves_one_copy():
    layer = ReplicatedLinear(64, 32, bias=False)
    load(layer, "weight", torch.randn(32, 64))
    before = layer(torch.ones(1, 64))[0]
    layer.process_weights_after_loading()
    assert dict(layer.named_parameters()) == {}
    torch.testing.assert_close(layer(torch.ones(1, 64))[0], before)
    layer.process_weights_after_loading()  # a second call changes nothing


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_of_the_ranks_are_the_whole(size):
    weight, bias, x = torch.randn(12, 8), torch.randn(12), torch.randn(3, 8)
    parts = []
    for rank in range(size):
        with seen_from(rank, size):
            layer = ColumnParallelLinear(8, 12, bias=True, return_bias=False)
        load(layer, "weight", weight)
        load(layer, "bias", bias)
        parts.append(layer(x))
    torch.testing.assert_close(torch.cat(parts, -1), x @ weight.T + bias)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_the_ranks_sum_to_the_whole(size):
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(3, 8)
    total = torch.zeros(3, 6)
    for rank in range(size):
        with seen_from(rank, size):
            layer = RowParallelLinear(8, 6, bias=True, input_is_parallel=False, return_bias=False)
            load(layer, "weight", weight)
            load(layer, "bias", bias)
            total += layer(x)  # a group without a process group sums nothing: done here
    torch.testing.assert_close(total, x @ weight.T + bias)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_merged_parts_keep_their_order(size, fused):
    gate, up, x = torch.randn(10, 8), torch.randn(10, 8), torch.randn(3, 8)
    outputs = []
    for rank in range(size):
        with seen_from(rank, size):
            layer = MergedColumnParallelLinear(8, [10, 10], bias=False, return_bias=False)
        if fused:
            load(layer, "weight", torch.cat((gate, up)))
        else:
            load(layer, "weight", up, 1)
            load(layer, "weight", gate, 0)
        outputs.append(layer(x).chunk(2, -1))
        torch.testing.assert_close(
            layer.forward_silu_and_mul(x),
            torch.nn.functional.silu(outputs[-1][0]) * outputs[-1][1],
        )
    torch.testing.assert_close(torch.cat([g for g, _ in outputs], -1), x @ gate.T)
    torch.testing.assert_close(torch.cat([u for _, u in outputs], -1), x @ up.T)


def test_silu_and_mul_with_a_bias():
    layer = MergedColumnParallelLinear(8, [4, 4], bias=True, return_bias=False)
    for shard in (0, 1):
        load(layer, "weight", torch.randn(4, 8), shard)
        load(layer, "bias", torch.randn(4), shard)
    x = torch.randn(3, 8)
    gate, up = layer(x).chunk(2, -1)
    torch.testing.assert_close(layer.forward_silu_and_mul(x), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    ("size", "kv_heads", "local_kv", "kv_of_rank"),
    [
        (1, 2, 2, [[0, 1]]),
        (2, 2, 1, [[0], [1]]),
        (4, 2, 1, [[0], [0], [1], [1]]),
        (2, 1, 1, [[0], [0]]),
        (4, 4, 1, [[0], [1], [2], [3]]),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_qkv_is_cut_by_heads_and_shares_kv_heads(size, kv_heads, local_kv, kv_of_rank, fused):
    heads, width, x = 4, 3, torch.randn(2, 5)
    query, key, value = (torch.randn(n * width, 5) for n in (heads, kv_heads, kv_heads))
    for rank in range(size):
        with seen_from(rank, size):
            layer = QKVParallelLinear(5, width, heads, kv_heads, bias=False, return_bias=False)
        if fused:
            load(layer, "weight", torch.cat((query, key, value)))
        else:
            for shard, tensor in (("v", value), ("q", query), ("k", key)):
                load(layer, "weight", tensor, shard)
        assert (layer.num_heads, layer.num_kv_heads) == (heads // size, local_kv)
        got = layer(x).split([heads // size * width, local_kv * width, local_kv * width], -1)
        mine = slice(rank * heads // size * width, (rank + 1) * heads // size * width)
        torch.testing.assert_close(got[0], x @ query[mine].T)
        for ours, whole in ((got[1], key), (got[2], value)):
            picked = whole.view(kv_heads, width, 5)[kv_of_rank[rank]].flatten(0, 1)
            torch.testing.assert_close(ours, x @ picked.T)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ColumnParallelLinear(8, 9, prefix="model.x"),
            "3 does not|2 does not divide the out",
        ),
        (
            lambda: RowParallelLinear(9, 8, prefix="model.x"),
            "does not divide the inputs of model.x",
        ),
        (lambda: QKVParallelLinear(8, 4, 3, 3), "does not divide the number of attention heads"),
        (lambda: QKVParallelLinear(8, 4, 6, 3), "does not divide the number of KV heads"),
    ],
)
def test_a_size_that_does_not_divide_names_the_option(build, message):
    with seen_from(0, 2), pytest.raises(ConfigError, match=r"--tensor-parallel-size 2.*") as raised:
        build()
    assert any(part in str(raised.value) for part in message.split("|"))


def test_kv_heads_that_cannot_be_shared_evenly():
    with (
        seen_from(0, 4),
        pytest.raises(ConfigError, match=r"4 is not a multiple of .*KV heads .3."),
    ):
        QKVParallelLinear(8, 4, 12, 3)


@pytest.mark.parametrize(
    ("layer", "shape", "shard"),
    [
        (lambda: ReplicatedLinear(8, 6), (6, 9), None),
        (lambda: ColumnParallelLinear(8, 6), (5, 8), None),
        (lambda: RowParallelLinear(8, 6), (8, 6), None),
        (lambda: MergedColumnParallelLinear(8, [6, 6]), (12, 8), 0),
        (lambda: MergedColumnParallelLinear(8, [6, 6]), (6, 8), None),
        (lambda: QKVParallelLinear(8, 2, 4, 2), (8, 8), "k"),
    ],
)
def test_a_wrong_shape_says_both_shapes(layer, shape, shard):
    with pytest.raises(WeightShapeError, match=r"has shape \[.*\], expected \["):
        load(layer(), "weight", torch.zeros(shape), shard)


def test_quantised_weights_are_refused():
    with pytest.raises(UnsupportedError, match=r"model\.x: quantised weights"):
        ReplicatedLinear(8, 8, quant_config=object(), prefix="model.x")
