"""TRITON_MLA against float64: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton

from tests.kernels.covering import covering_array
from vllm.model_executor.layers.attention.mla_attention import LatentUpProjection
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla.triton_mla import (
    TritonMLABackend,
    TritonMLAImpl,
    TritonMLAMetadata,
    TritonMLAMetadataBuilder,
)
from vllm.v1.attention.ops.triton_mla import store_latents
from vllm.v1.attention.ops.triton_mla_prefill import attention_tiles, expand_tiles
from vllm.v1.attention.ops.triton_shares import SHARE_TILE, make_share_buffers, plan_shares
from vllm.v1.kv_cache_interface import MLAAttentionSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# (tokens in the cache, of these new) per request. Tiny layers expand from 2 new tokens on.
BATCHES = {
    "decode": ((33, 1), (1, 1), (140, 1)),
    "split": ((700, 1), (5, 1)),
    "prefill": ((33, 20), (150, 140), (2, 2)),
    "mixed": ((70, 1), (40, 40), (1, 1), (133, 3), (33, 2)),
}
# R, nope, rope, v.
TINY, V2, V3_HEAD = (32, 16, 8, 16), (512, 128, 64, 128), (48, 24, 16, 40)


class Call:
    """One layer, its cache (NaN where nothing was stored), and a step."""

    def __init__(
        self,
        lengths: tuple[tuple[int, int], ...],
        widths: tuple[int, int, int, int] = TINY,
        heads: int = 3,
        page: int = 16,
        pad: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rank, nope, rope, v = widths
        self.lengths, self.heads, self.dtype = lengths, heads, dtype
        projection = LatentUpProjection(rank, heads, nope, v)
        torch.nn.init.normal_(projection.weight, std=rank**-0.5)
        projection = projection.to(DEVICE, dtype)
        projection._split(projection.weight.data)
        self.layer = SimpleNamespace(
            kv_b_proj=projection, kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
            v_head_dim=v, num_heads=heads,
        )  # fmt: skip
        self.scale = (nope + rope) ** -0.5
        self.impl = TritonMLAImpl(heads, rank + rope, self.scale, 1)
        pages = [-(-n // page) for n, _ in lengths]
        width = page * (rank + rope)
        raw = torch.full((sum(pages) + 3, width + pad), float("nan"), dtype=dtype, device=DEVICE)
        self.cache = raw[:, :width].unflatten(1, (page, rank + rope))
        self.gaps = raw[:, width:]
        free = (torch.randperm(sum(pages) + 2) + 1).tolist()
        self.table = torch.full((len(pages), max(pages)), 0, dtype=torch.int32)
        for request, (length, _) in enumerate(lengths):
            blocks = torch.tensor([free.pop() for _ in range(pages[request])])
            self.table[request, : len(blocks)] = blocks.int()
            at = torch.arange(length)
            slots = (blocks[at // page] * page + at % page).to(DEVICE)
            # Latents within wider rows, as a fused projection leaves them.
            wide = torch.randn(length, rank + rope + 3).to(DEVICE, dtype)
            store_latents(wide[:, :rank], wide[:, rank : rank + rope], self.cache, slots)
        self.starts = torch.tensor([0, *itertools.accumulate(n for _, n in lengths)]).int()
        tokens = int(self.starts[-1])
        self.query = torch.randn(tokens, heads + 2, nope + rope).to(DEVICE, dtype)[:, 1:-1]

    def common(self) -> CommonAttentionMetadata:
        lens = torch.tensor([n for n, _ in self.lengths]).int()
        counts = torch.tensor([n for _, n in self.lengths]).int()
        return CommonAttentionMetadata(
            query_start_loc=self.starts.to(DEVICE), query_start_loc_cpu=self.starts,
            seq_lens=lens.to(DEVICE), seq_lens_cpu=lens, num_computed_tokens_cpu=lens - counts,
            num_reqs=len(self.lengths), num_actual_tokens=int(self.starts[-1]),
            max_query_len=int(counts.max()), max_seq_len=int(lens.max()),
            block_table_tensor=self.table.to(DEVICE),
            slot_mapping=torch.full((int(self.starts[-1]),), -1, device=DEVICE),
        )  # fmt: skip

    def metadata(self) -> TritonMLAMetadata:
        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=4096, dtype=self.dtype, get_num_attention_heads=lambda _: self.heads
            ),
            parallel_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=16),
        )
        spec = MLAAttentionSpec(
            block_size=16, num_kv_heads=1, head_size=self.cache.shape[2], dtype="float32"
        )
        builder = TritonMLAMetadataBuilder(spec, ["layer"], config, torch.device(DEVICE))
        return builder.build(0, self.common())

    def run(self) -> torch.Tensor:
        out = torch.full(
            (self.query.shape[0], self.heads, self.layer.v_head_dim), float("nan"),
            dtype=self.dtype, device=DEVICE,
        )  # fmt: skip
        self.impl.forward(self.layer, self.query, None, None, self.cache, self.metadata(), out)
        return out

    def exact(self) -> torch.Tensor:
        """Every key and value expanded, in float64."""
        layer, page = self.layer, self.cache.shape[1]
        weight = layer.kv_b_proj.weight.data.cpu().double().unflatten(0, (self.heads, -1))
        nope, rank = layer.qk_nope_head_dim, layer.kv_lora_rank
        outputs = []
        for request, (length, new) in enumerate(self.lengths):
            blocks = self.table[request, : -(-length // page)].long()
            states = self.cache.cpu()[blocks].flatten(0, 1)[:length].double()
            both = torch.einsum("sr,hwr->shw", states[:, :rank], weight)
            keys = torch.cat(
                (both[..., :nope], states[:, None, rank:].expand(-1, self.heads, -1)), -1
            )
            first = int(self.starts[request])
            query = self.query[first : first + new].cpu().double()
            scores = torch.einsum("thd,shd->hts", query, keys) * self.scale
            later = torch.arange(length)[None] > torch.arange(length - new, length)[:, None]
            weights = scores.masked_fill(later, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hts,shv->thv", weights, both[..., nope:]))
        return torch.cat(outputs)

    def error(self) -> float:
        exact = self.exact()
        return float((self.run().cpu().double() - exact).norm() / exact.norm())


@pytest.fixture(autouse=True)
def _seed(seed: int) -> None:
    """Fresh inputs, and the seed in the output of a test that fails."""


@pytest.mark.parametrize("name", BATCHES)
def test_attention_equals_float64(name: str) -> None:
    assert Call(BATCHES[name]).error() < TOLERANCE[torch.float32]


FEATURES: dict[str, list[Any]] = {
    "lengths": [BATCHES["decode"], BATCHES["mixed"], ((33, 20), (2, 2))],
    "widths": [TINY, V3_HEAD],
    "heads": [1, 20],
    "page": [16, 48, 64],
    "pad": [0, 40],
    "dtype": [torch.float32, torch.float16],
}


def test_whatever_is_combined_equals_float64(rng: random.Random) -> None:
    for row in covering_array(FEATURES, rng):
        call = Call(**row)
        assert call.error() < TOLERANCE[call.dtype], row
        assert call.gaps.isnan().all()


def test_the_widths_of_deepseek_v3() -> None:
    assert Call(((40, 1), (20, 1)), V2, heads=2).error() < TOLERANCE[torch.float32]
    assert Call(((70, 60), (3, 1)), V2, heads=2).error() < TOLERANCE[torch.float32]


def test_heads_are_expanded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.mla import triton_mla

    monkeypatch.setattr(triton_mla, "_EXPANDED_BYTES", 2 * 40 * 64 * 4)
    assert Call(((40, 40), (17, 1)), heads=5).error() < TOLERANCE[torch.float32]


def test_few_new_tokens_attend_to_latents_and_many_to_keys() -> None:
    call = Call(((300, 30), (64, 44), (9, 1)), V2, heads=1)
    absorbed, expanded = call.metadata().split(43)
    assert absorbed is not None and expanded is not None
    assert absorbed.rows is not None
    assert absorbed.rows.tolist() == [*range(30), 74]
    assert expanded.num_latents == 64
    everything, nothing = call.metadata().split(100)
    assert nothing is None and everything is not None and everything.rows is None


def test_a_slot_of_minus_one_stores_nothing() -> None:
    call = Call(((5, 1),), pad=8)
    before = call.cache.clone()
    store_latents(
        torch.zeros(2, 32, device=DEVICE), torch.zeros(2, 8, device=DEVICE), call.cache,
        torch.tensor([-1, 1], device=DEVICE),
    )  # fmt: skip
    assert (call.cache[0, 1] == 0).all()
    call.cache[0, 1] = before[0, 1]
    assert torch.equal(call.cache.nan_to_num(-7.0), before.nan_to_num(-7.0))


def test_tiles_cover_each_token_once() -> None:
    rows, lens, counts = [4, 0, 2], [300, 1, 129], [200, 1, 129]
    firsts = [10, 300, 500]
    tiles = expand_tiles(rows, lens)
    covered = [(int(r), int(t)) for r, b, n, _ in tiles for t in range(b, b + n)]
    assert sorted(covered) == sorted(
        (r, t) for r, n in zip(rows, lens, strict=True) for t in range(n)
    )
    assert np.array_equal(tiles[:, 3], np.concatenate(([0], np.cumsum(tiles[:, 2])[:-1])))
    queries = attention_tiles(rows, firsts, counts, lens)
    seen = sorted((int(t[1]) + i, int(t[3]) + i) for t in queries for i in range(t[2]))
    expected = [
        (first + i, n - count + i)
        for first, count, n in zip(firsts, counts, lens, strict=True)
        for i in range(count)
    ]
    assert seen == sorted(expected)
    assert list(queries[:, 3]) == sorted(queries[:, 3], reverse=True)


@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize(
    "lengths",
    [(0,), (1,), (5000,), (640,) * 3, (64, 0, 6400, 1, 0, 700), (100,) * 9, (8000, 300, 300, 0)],
    ids=str,
)
def test_shares_are_equal_and_cover_each_tile_once(lengths: tuple[int, ...], programs: int) -> None:
    """The fourth request, if there is one, has two query tokens, and no share."""
    counts = torch.tensor([2 if i == 3 else 1 for i in range(len(lengths))])
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int().to(DEVICE)
    buffers = make_share_buffers(len(lengths) + 2, 2, 2 * programs, torch.device(DEVICE))
    plan = plan_shares(torch.tensor(lengths).int().to(DEVICE), starts, buffers)
    assert plan.num_programs == programs and plan.requests.shape[0] == len(lengths)
    tiles = [0 if i == 3 else -(-n // SHARE_TILE) for i, n in enumerate(lengths)]
    owners = [request for request, count in enumerate(tiles) for _ in range(count)]
    taken: list[int] = []
    cut = 0
    for program, (first, end, request, last) in enumerate(plan.programs.tolist()):
        if first == end:
            continue
        assert first == len(taken) and (request, last) == (owners[first], owners[end - 1])
        cut = max(cut, end - first)
        taken += [program] * (end - first)
    assert len(taken) == len(owners)
    assert cut <= max(2, -(-17 * len(owners) // (16 * programs)) + 1)
    for request, (first, end, length, row, *ends) in enumerate(plan.requests.tolist()[:6]):
        assert end - first == tiles[request] and row == int(starts[request])
        if end > first:
            assert length == lengths[request]
            assert ends[:2] == [taken[first], taken[end - 1]]
        else:
            assert ends[0] == ends[1]


def test_what_it_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"head_size": 576, "dtype": torch.bfloat16, "use_mla": True, "block_size": 64}
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    check = TritonMLABackend.validate_configuration
    assert check(**wanted) == []
    assert "head size 584" in check(**wanted | {"head_size": 584})[0]
    assert "block size 40" in check(**wanted | {"block_size": 40})[0]
    assert "only for MLA" in check(**wanted | {"use_mla": False})[0]
    assert "kv cache dtype fp8" in check(**wanted | {"kv_cache_dtype": "fp8"})[0]
    assert "needs a model of that dtype" in check(**wanted | {"kv_cache_dtype": "float16"})[0]
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in check(**wanted)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [16, 40, 128])
@pytest.mark.parametrize("name", [*BATCHES, "long"])
def test_deepseek_v3_on_a_gpu(name: str, heads: int, dtype: torch.dtype) -> None:
    lengths = (BATCHES | {"long": ((3000, 1), (2000, 500), (1500, 20))})[name]
    assert Call(lengths, V2, heads, page=64, dtype=dtype).error() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 192])
@pytest.mark.parametrize("heads", [16, 128])
def test_pages_of_any_size_on_a_gpu(heads: int, page: int) -> None:
    lengths = ((3000, 1), (1, 1), (200, 1))
    call = Call(lengths, V2, heads, page=page, pad=64, dtype=torch.bfloat16)
    assert call.error() < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_a_captured_decode_serves_other_lengths(heads: int) -> None:
    call = Call(((900, 1), (5, 1), (64, 1)), V2, heads, page=64, dtype=torch.bfloat16)
    metadata = call.metadata()
    out = torch.empty(3, heads, 128, dtype=torch.bfloat16, device="cuda")
    assert metadata.plan is not None
    arguments = (call.layer, call.query, None, None, call.cache, metadata, out)
    call.impl.forward(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.impl.forward(*arguments)
    shorter = torch.tensor([300, 0, 64], dtype=torch.int32, device="cuda")
    metadata.seq_lens.copy_(shorter)
    plan_shares(metadata.seq_lens, metadata.query_start_loc, metadata.plan)
    graph.replay()
    call.lengths = ((300, 1), (5, 1), (64, 1))
    exact = call.exact()
    for row in (0, 2):
        error = (out[row].cpu().double() - exact[row]).norm() / exact[row].norm()
        assert error < TOLERANCE[torch.bfloat16]
