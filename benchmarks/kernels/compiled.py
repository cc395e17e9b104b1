"""What our Triton kernels become on Hopper, found out without a GPU.

    python benchmarks/kernels/compiled.py [--only REGEX] [--output FILE]

Every case calls launchers as the engine does, at the sizes of the models that it names, with
tensors on the CPU: a driver that stands in for CUDA's has Triton compile for compute capability
9.0 by the ptxas that it brings along, and starts nothing. Told are registers of a thread, bytes
that it spills, bytes of shared memory, and matrix descriptors with those that are wrong (see
``sass.py``). Ends with 1 where a descriptor is wrong. What a case shares with one before it is left
out.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import sass

from vllm import _cuda_ops, _triton_linear_attention, _triton_state_ops
from vllm._torch_state_ops import StateSegments
from vllm.distributed.device_communicators.peer_words import PeerWords
from vllm.utils import dependent_launch
from vllm.v1.attention.ops import (
    triton_cascade,
    triton_decode,
    triton_kv_store,
    triton_mla,
    triton_mla_prefill,
    triton_paged_attention,
    triton_shares,
    triton_slots,
    triton_split_attention,
    triton_state_blocks,
    triton_tails,
)
from vllm.v1.attention.ops.kv_formats import KVFormat, kv_format
from vllm.v1.attention.ops.turboquant import TurboQuantFormat
from vllm.v1.kv_cache import triton_movers
from vllm.v1.sample.ops import triton_sample, triton_truncate
from vllm.v1.worker.gpu import kernels as input_kernels

Case = tuple[str, Callable[[], None]]
Row = dict[str, Any]
BF16, FP16, TOKENS = torch.bfloat16, torch.float16, 64


@dataclass(frozen=True, kw_only=True)
class Model:
    heads: int
    kv_heads: int
    hidden: int
    inner: int
    vocabulary: int
    has_head_norms: bool


MODELS = {
    "Qwen3-0.6B": Model(
        heads=16, kv_heads=8, hidden=1024, inner=3072, vocabulary=151936, has_head_norms=True
    ),
    "Llama-3.1-8B": Model(
        heads=32, kv_heads=8, hidden=4096, inner=14336, vocabulary=128256, has_head_norms=False
    ),
}


@dataclass
class Hopper:
    """Stands in for the CUDA driver of an H100: keeps what is loaded, starts nothing."""

    loaded: list[tuple[str, bytes, int]] = field(default_factory=list)
    known: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The two faces of a Triton driver that only CUDA's own code has.
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448}, load_binary=self._load
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        if cubin not in self.known:
            self.known.add(cubin)
            self.loaded.append((name, cubin, shared))
        used = sass.usage(cubin)
        return None, None, used.registers, used.spilled // 4, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend() -> Hopper:
    """Have this process compile for an H100 from here on; it can't run kernels any more."""
    hopper = Hopper()
    driver.set_active(hopper)
    facts = SimpleNamespace(
        multi_processor_count=132, major=9, minor=0, shared_memory_per_multiprocessor=233472
    )
    properties: Any = lambda device=None: facts  # noqa: E731 (mypy wants CUDA's own type)
    torch.cuda.get_device_properties = properties
    stand_ins = {
        dependent_launch.is_hopper: lambda device: True,
        dependent_launch.options: lambda device: {"PDL": True, "launch_pdl": True},
        triton_decode.num_multiprocessors: lambda device: 132,
    }
    for module in [m for name, m in sys.modules.items() if name.startswith("vllm")]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in stand_ins:
                setattr(module, name, stand_ins[value])
    return hopper


def step(requests: int, tokens: int, context: int = 8192) -> tuple[torch.Tensor, ...]:
    """query_start_loc, seq_lens and a block table of pages of 16 of requests of ``tokens`` each."""
    starts = torch.arange(requests + 1, dtype=torch.int32) * tokens
    lens = torch.full((requests,), context, dtype=torch.int32)
    return starts, lens, torch.zeros(requests, context // 16, dtype=torch.int32)


def paged(
    heads: int, kv_heads: int, size: int, page: int, tokens: int, dtype: torch.dtype = BF16,
    fmt: KVFormat | None = None, **options: Any,
) -> None:  # fmt: skip
    starts, lens, table = step(TOKENS // tokens, tokens)
    cache = torch.empty(9, kv_heads, page, 2 * size, dtype=dtype)
    if fmt is not None:
        shape = (9, fmt.head_slots(kv_heads), page, fmt.content_bytes(size))
        cache = torch.empty(shape, dtype=torch.uint8)
    # Inside a row with keys and values, as a fused projection leaves it; rotated ones stand alone.
    q = torch.empty(TOKENS, heads + 2 * kv_heads, size, dtype=dtype)[:, :heads]
    if isinstance(fmt, TurboQuantFormat) and fmt.rotates:
        q = q.contiguous()
    triton_paged_attention.paged_attention(
        q, cache, torch.empty(TOKENS, heads, size, dtype=dtype), query_start_loc=starts,
        seq_lens=lens, block_table=table, max_query_len=tokens, max_seq_len=8192, scale=0.1,
        has_decodes=tokens == 1, fmt=fmt, **options,
    )  # fmt: skip


def store(model: Model, fmt: KVFormat | None) -> None:
    row = torch.empty(TOKENS, model.heads + 2 * model.kv_heads, 128, dtype=BF16)
    q, k, v = row.split((model.heads, model.kv_heads, model.kv_heads), 1)
    slots = torch.zeros(TOKENS, dtype=torch.int64)
    cache = torch.empty(9, model.kv_heads, 16, 256, dtype=BF16)
    if fmt is not None:
        shape = (9, fmt.head_slots(model.kv_heads), 16, fmt.content_bytes(128))
        cache = torch.empty(shape, dtype=torch.uint8)
    if isinstance(fmt, TurboQuantFormat):
        triton_slots.store_slots(k, v, cache, slots, fmt)
        return
    norms = (torch.empty(128, dtype=BF16),) * 2 if model.has_head_norms else None
    triton_kv_store.rotate_and_store(
        q, k, v, cache, slots, slots, torch.empty(8192, 128), True, norms, 1e-6, fmt
    )


def cascade(model: Model) -> None:
    starts, lens, table = step(TOKENS, 1)
    plan = triton_cascade.plan_cascade(4096, 16, lens, starts, model.kv_heads, 8192)
    q = torch.empty(TOKENS, model.heads, 128, dtype=BF16)
    cache = torch.empty(9, model.kv_heads, 16, 256, dtype=BF16)
    triton_cascade.cascade_attention(
        q, cache, torch.empty_like(q), plan, query_start_loc=starts, block_table=table,
        max_seq_len=8192, scale=0.1,
    )  # fmt: skip


def split(model: Model, tokens: int) -> None:
    starts, lens, table = step(TOKENS // tokens, tokens)
    q = torch.empty(TOKENS, model.heads, 128, dtype=BF16)
    k_cache, v_cache = (torch.empty(9, 16, model.kv_heads, 128, dtype=BF16) for _ in range(2))
    key = torch.empty(TOKENS, model.kv_heads, 128, dtype=BF16)
    slots = torch.zeros(TOKENS, dtype=torch.int64)
    triton_split_attention.store_split(key, key, k_cache, v_cache, slots)
    triton_split_attention.split_attention(
        q, k_cache, v_cache, torch.empty_like(q), query_start_loc=starts, seq_lens=lens,
        block_table=table, max_query_len=tokens, max_seq_len=8192, scale=0.1,
        has_decodes=tokens == 1,
    )  # fmt: skip


def latents(heads: int) -> None:
    """DeepSeek V2 Lite's 16 heads, V3's 128."""
    starts, lens, table = step(TOKENS, 1)
    config = triton_mla.default_absorbed_config(heads, BF16, torch.device("cuda"))
    cpu = torch.device("cpu")
    cache = torch.empty(9, 64, 576, dtype=BF16)
    query, rotated = (torch.empty(TOKENS, heads, n, dtype=BF16) for n in (512, 64))
    slots = torch.zeros(TOKENS, dtype=torch.int64)
    triton_mla.store_latents(query[:, 0], rotated[:, 0], cache, slots)
    plan = triton_shares.plan_shares(
        lens, starts, triton_mla.make_absorbed_buffers(TOKENS, heads, BF16, cpu, config)
    )
    triton_mla.absorbed_attention(
        query, rotated, cache, torch.empty_like(query), plan, table, scale=0.1, config=config
    )
    keys = torch.empty(256, heads * 128, dtype=BF16)
    weight = torch.empty(heads, 256, 512, dtype=BF16)
    tiles = torch.from_numpy(triton_mla_prefill.expand_tiles([0], [256]))
    triton_mla_prefill.expand_latents(cache, weight[:, :128], keys, table, tiles)
    tiles = torch.from_numpy(triton_mla_prefill.attention_tiles([0], [0], [256], [256]))
    triton_mla_prefill.expanded_attention(
        torch.empty(256, heads, 192, dtype=BF16), keys, keys, cache,
        torch.empty(256, heads, 128, dtype=BF16), table, tiles, rank=512, scale=0.1,
    )  # fmt: skip


def delta_rule(kind: str, tokens: int) -> None:
    heads, key_heads = {"gated": (32, 16), "kimi": (32, 32), "lightning": (64, 64)}[kind]
    q = torch.empty(TOKENS, key_heads, 128, dtype=BF16)
    v = torch.empty(TOKENS, heads, 128, dtype=BF16)
    rates, per_head = torch.empty(heads), torch.empty(TOKENS, heads, dtype=BF16)
    gate, beta, biases = {
        "gated": (per_head, per_head, rates),
        "kimi": (v, per_head, torch.empty(heads, 128)),
        "lightning": (None, None, None),
    }[kind]
    _triton_linear_attention.linear_attention(
        q, q, v, gate, beta, rates, biases, torch.empty(65, heads, 128, 128), segments(tokens),
        0.1, kind != "lightning", torch.empty_like(v),
    )  # fmt: skip


def segments(tokens: int) -> StateSegments:
    requests = TOKENS // tokens
    starts, lens, table = step(requests, tokens)
    blocks = triton_state_blocks.StateBlocks(256, torch.device("cpu"))
    return blocks.find(starts, lens, table, 0, TOKENS)


def states(tokens: int) -> None:
    """Nemotron-H 8B's scan, Falcon-Mamba 7B's, and Qwen3-Next's convolution and norm."""
    found = segments(tokens)
    ones, groups = torch.empty(128), torch.empty(TOKENS, 8, 128, dtype=BF16)
    _triton_state_ops.ssd_scan(
        torch.empty(TOKENS, 128, 64, dtype=BF16), torch.empty(TOKENS, 128, dtype=BF16), ones,
        groups, groups, ones, ones, (0.0, float("inf")), torch.empty(65, 128, 64, 128), found,
    )  # fmt: skip
    wide, narrow = (torch.empty(TOKENS, n, dtype=BF16) for n in (8192, 16))
    _triton_state_ops.selective_scan(
        wide, wide, torch.empty(8192, 16), narrow, narrow, torch.empty(8192), wide, None,
        torch.empty(65, 8192, 16), found,
    )  # fmt: skip
    _triton_state_ops.causal_conv1d(
        wide, torch.empty(4, 8192), None, torch.empty(65, 3, 8192, dtype=BF16), found
    )
    _triton_state_ops.gated_rms_norm(wide, wide, torch.empty(8192, dtype=BF16), 1e-6, 8, False)


def dense(model: Model, rows: int) -> None:
    """Norms, activations, the head and the products that are ours and not cuBLAS's."""
    x, out = (torch.empty(rows, n, dtype=BF16) for n in (model.hidden, 2 * model.inner))
    weight = torch.empty(model.hidden, dtype=BF16)
    _cuda_ops.rms_norm(x, weight, 1e-6)
    _cuda_ops.fused_add_rms_norm(x, x.clone(), weight, 1e-6)
    _cuda_ops.silu_and_mul(out)
    _cuda_ops.embedding_part(
        torch.zeros(rows, dtype=torch.int64), torch.empty(1024, model.hidden, dtype=BF16), 0
    )
    width = (model.heads + 2 * model.kv_heads) * 128
    for n, k in ((width, model.hidden), (model.hidden, model.heads * 128),
                 (model.hidden, model.inner), (model.vocabulary, model.hidden)):  # fmt: skip
        config = _cuda_ops._choose(rows, n, k, 2, False, x.device)
        if config is not None:
            # Never touched, so never there.
            weights = torch.empty(n, k, dtype=BF16)
            _cuda_ops.skinny_product(x.new_empty(rows, k), weights, None, False, config)
    config = _cuda_ops._choose(rows, 2 * model.inner, model.hidden, 2, True, x.device)
    if config is not None:
        weights = torch.empty(2 * model.inner, model.hidden, dtype=BF16)
        _cuda_ops.skinny_product(x, weights, None, True, config)


def sampling(model: Model) -> None:
    scratch = triton_sample.DrawScratch.make(TOKENS, model.vocabulary, torch.device("cpu"))
    logits = torch.empty(TOKENS, model.vocabulary, dtype=BF16)
    floats, ints = torch.empty(TOKENS), torch.empty(TOKENS, dtype=torch.int32)
    out = torch.empty(TOKENS, dtype=torch.int64)
    triton_sample.sample_rows(logits, floats, floats, scratch, out)
    limits = (ints, floats, floats)
    triton_truncate.truncate_rows(logits, floats, floats, limits, scratch, out)


def inputs() -> None:
    words, table = torch.empty(8192, dtype=torch.int32), step(TOKENS, 1)[2]
    longs, floats = torch.empty(TOKENS, dtype=torch.int64), torch.empty(TOKENS)
    input_kernels.apply_table_changes[(1,)](words, table, 1, 2, 3, BLOCK=1024)
    for is_first, copies in ((True, True), (True, False), (False, False)):
        input_kernels.prepare_inputs[(TOKENS, 1)](
            words, words.view(torch.float32), longs, table, table.stride(0), 16, longs, longs,
            words, words, longs, floats, floats, 1, 2, 3, 4, 5, TOKENS, TOKENS,
            FIRST_GROUP=is_first, COPIES_SAMPLING=copies, BLOCK=256, num_warps=2,
        )  # fmt: skip


def movers() -> None:
    here, there = (torch.empty(1 << 20, dtype=torch.int8) for _ in range(2))
    triton_movers.move_box(here, there, [(0, 65536)], length=65536)
    triton_movers.zero_box(here, [0], length=65536)
    starts = np.arange(4, dtype=np.int64) * 65536
    pieces = np.array([[0, 0, 32768], [131072, 32768, 32768]])
    for shape in (triton_movers.LOCAL, triton_movers.PEER):
        mover = triton_movers.PieceTable(pieces, torch.device("cpu"), shape)
        mover.move(here.data_ptr(), there.data_ptr(), starts, starts)
    query_starts, lens, table = step(TOKENS, 1)
    triton_tails.clear_tails(torch.empty(9, 8, 16, 256, dtype=BF16), table, query_starts, lens)


def exchange(model: Model) -> None:
    areas = [torch.zeros(1 << 20, dtype=torch.int32) for _ in range(2)]
    peers = PeerWords.of(0, areas)
    x, weight = torch.empty(TOKENS, model.hidden, dtype=BF16), torch.empty(model.hidden, dtype=BF16)
    peers.all_reduce(x)
    peers.add_rms_norm(x, x.clone(), weight, 1e-6)
    peers.all_gather(x)


def cases() -> Iterator[Case]:
    for name, model in MODELS.items():
        heads = (model.heads, model.kv_heads, 128)
        for page in (16, 64):
            yield f"{name} decode, page {page}", partial(paged, *heads, page, 1)
            yield f"{name} prompt, page {page}", partial(paged, *heads, page, 32)
        yield f"{name} decode behind a shared prefix", partial(cascade, model)
        yield f"{name} store", partial(store, model, None)
        yield f"{name} sampling", partial(sampling, model)
        yield f"{name} exchange, 2 GPUs", partial(exchange, model)
        for rows in (1, 16, 64):
            yield f"{name} dense, {rows} rows", partial(dense, model, rows)
    llama = MODELS["Llama-3.1-8B"]
    for tokens in (1, 32):
        yield f"K and V apart, {tokens} tokens", partial(split, llama, tokens)
    for cache in (
        "fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head",
        "nvfp4", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc",
        "turboquant_3bit_nc",
    ):  # fmt: skip
        fmt = kv_format(cache)
        yield f"{cache} store", partial(store, llama, fmt)
        yield f"{cache} decode", partial(paged, 32, 8, 128, 64, 1, BF16, fmt)
        for dtype in (BF16, FP16):
            name = str(dtype).removeprefix("torch.")
            yield f"{cache} prompt, {name}", partial(paged, 32, 8, 128, 64, 32, dtype, fmt)
        if isinstance(fmt, TurboQuantFormat):
            for size in (16, 32, 64, 256):
                run = partial(paged, 16, 4, size, 16, 32, FP16, fmt)
                yield f"{cache} prompt, float16, head size {size}", run
    for size in (64, 80, 96, 192, 256):
        for page in (16, 64):
            yield f"prompt, head size {size}, page {page}", partial(paged, 16, 4, size, page, 32)
    sinks = torch.zeros(64)
    for options in ({"window": 128}, {"sinks": sinks}, {"window": 128, "sinks": sinks},
                    {"soft_cap": 50.0}, {"alibi_slopes": sinks}):  # fmt: skip
        name = " and ".join(sorted(options))
        for size in (64, 128, 256):
            run = partial(paged, 64, 8, size, 64, 32, **options)
            yield f"prompt with {name}, head size {size}", run
    for count in (16, 128):
        yield f"latents, {count} heads", partial(latents, count)
    for tokens in (1, 32):
        yield f"states, {tokens} tokens", partial(states, tokens)
        for kind in ("gated", "kimi", "lightning"):
            yield f"{kind} delta rule, {tokens} tokens", partial(delta_rule, kind, tokens)
    yield "a step's inputs", inputs
    yield "movers", movers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hopper, rows = pretend(), []
    for case, run in cases():
        if not re.search(arguments.only, case):
            continue
        run()
        for name, cubin, shared in hopper.loaded:
            used, (count, wrong) = sass.usage(cubin), sass.descriptors(cubin)
            row: Row = {
                "case": case, "kernel": name, "registers": used.registers, "spilled": used.spilled,
                "shared": shared, "descriptors": count, "wrong": list(wrong),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
        hopper.loaded.clear()
    if arguments.output:
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": f"none; compiled for sm_90 on {platform.machine()}",
            "triton": triton.__version__, "ptxas": sass.ptxas_version(),
            "command": " ".join(sys.argv), "rows": rows,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
