"""``vllm kv-plan``: what a model's KV cache will look like, from its ``config.json`` alone.

Reads no weights, needs no GPU and imports no torch: specs come from the model's declarations, the
rest from the planner that the engine uses. Decides nothing itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Kind, arg, flags_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache.config import KVCacheConfig
    from vllm.v1.kv_cache.resolver import BackendConstraints, CacheMovement

__all__ = ["KvPlanArgs", "make_parser", "plan", "run"]

_GROUP = "kv-plan"
_DEFAULT_MEMORY = 80 << 30
_TABLE_WIDTH = 136
"""Columns that the tables need to be read; a narrower terminal wraps them."""


@dataclass(frozen=True, kw_only=True)
class KvPlanArgs:
    """Options of ``vllm kv-plan``; named and meant as ``vllm serve``'s where both have them."""

    tensor_parallel_size: int = arg(
        1, _GROUP, Kind.INT, "Ranks that share the heads of every layer.", short="-tp", minimum=1
    )
    kv_cache_dtype: str = arg(
        "auto", _GROUP, Kind.STR, "Format of the cache, such as fp8 or nvfp4; auto: the model's."
    )
    kv_cache_dtype_skip_layers: list[str] = arg(
        [], _GROUP, Kind.LIST, "Names of layers that keep the model's dtype."
    )
    block_size: int | None = arg(
        None,
        _GROUP,
        Kind.INT,
        "Tokens of a block; multiplied only where states beside it need it.",
        minimum=1,
    )
    memory: int = arg(
        _DEFAULT_MEMORY,
        _GROUP,
        Kind.SIZE,
        "Bytes of the cache on one rank, such as 80GiB; weights are not counted.",
        minimum=1,
    )
    max_model_len: int | None = arg(
        None,
        _GROUP,
        Kind.SIZE,
        "Tokens of the longest request; by default the model's, or what fits into the memory.",
        minimum=1,
    )
    max_num_batched_tokens: int = arg(
        2048, _GROUP, Kind.SIZE, "Tokens of one step, at most.", minimum=1
    )
    dtype: str = arg("auto", _GROUP, Kind.STR, "Dtype of the model; auto: the checkpoint's.")
    connector: str | None = arg(
        None, _GROUP, Kind.STR, "What moves blocks, such as Nixl, Mooncake, Offloading, LMCache."
    )
    layout: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Layout to use, as VLLM_KV_CACHE_LAYOUT: one of the six, HND or NHD.",
    )
    attention_backend: str | None = arg(
        None, _GROUP, Kind.STR, "Backend whose layouts and block sizes to respect (loads torch)."
    )
    mamba_cache_mode: str = arg(
        "none",
        _GROUP,
        Kind.STR,
        "Which states are kept for prefix reuse.",
        choices=("none", "align", "all"),
    )
    mamba_block_size: int | None = arg(
        None, _GROUP, Kind.INT, "Tokens between two states that are kept.", minimum=1
    )
    mamba_cache_dtype: str = arg("auto", _GROUP, Kind.STR, "Dtype of convolution states.")
    mamba_ssm_cache_dtype: str = arg("auto", _GROUP, Kind.STR, "Dtype of recurrent states.")
    disable_hybrid_kv_cache_manager: bool = arg(
        False, _GROUP, Kind.SWITCH, "Keep every token of windowed layers too."
    )
    json: bool = arg(False, _GROUP, Kind.SWITCH, "Print the report as JSON.")


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm kv-plan``."""
    parser = FlexibleArgumentParser(
        prog="vllm kv-plan",
        usage="vllm kv-plan MODEL_OR_CONFIG [options]",
        description="Plan a model's KV cache from its configuration: no weights, no GPU.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="A config.json (of any name), a model's directory, a .gguf file or a hub id.",
    )
    for flag in flags_of(KvPlanArgs).values():
        parser.add_flag(flag)
    return parser


def _read_config(model: str) -> Any:
    from vllm.transformers_utils.config import load_hf_config
    from vllm.transformers_utils.hf_config import fill_in_config
    from vllm.transformers_utils.model_path import resolve_model_path

    path = Path(model).expanduser()
    if path.suffix != ".json":
        return load_hf_config(resolve_model_path(model, weights=False))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", parameter="model") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object", parameter="model")
    return fill_in_config(values)


def _configure(args: argparse.Namespace) -> VllmConfig:
    """The settings as ``vllm serve`` would resolve them on an accelerator."""
    from vllm import envs
    from vllm.config import (
        CacheConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.engine.resolve import resolve_dtype, resolve_max_model_len
    from vllm.transformers_utils.hf_config import derive_max_model_len
    from vllm.v1.kv_cache.declare import DEFAULT_BLOCK_SIZE
    from vllm.v1.kv_cache.grouping import COMPARED_REQUEST

    hf_config = _read_config(args.model)
    text = hf_config.get_text_config()
    names = getattr(hf_config, "architectures", None) or getattr(text, "architectures", None)
    if not names:
        raise ConfigError(f"{args.model} names no 'architectures'", parameter="model")
    checkpoint = getattr(text, "dtype", None) or getattr(hf_config, "dtype", None)
    limit = derive_max_model_len(text)
    length = resolve_max_model_len(args.max_model_len, limit)
    if args.max_model_len is None and limit is None:
        length = COMPARED_REQUEST
    return VllmConfig(
        model_config=ModelConfig(
            model=args.model,
            model_path=args.model,
            tokenizer=args.model,
            hf_config=hf_config,
            hf_text_config=text,
            architecture=names[0],
            dtype_name=resolve_dtype(
                args.dtype,
                str(checkpoint).removeprefix("torch.") if checkpoint else None,
                device_type="cuda",
                supported=("bfloat16", "float16", "float32"),
            ),
            max_model_len=length,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_num_seqs=1,
            max_model_len=length,
            disable_hybrid_kv_cache_manager=args.disable_hybrid_kv_cache_manager,
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=args.tensor_parallel_size),
        cache_config=CacheConfig(
            block_size=args.block_size or DEFAULT_BLOCK_SIZE,
            user_specified_block_size=args.block_size is not None,
            kv_cache_memory_bytes=args.memory,
            cache_dtype=args.kv_cache_dtype,
            kv_cache_dtype_skip_layers=tuple(args.kv_cache_dtype_skip_layers),
            kv_cache_layout=args.layout or envs.VLLM_KV_CACHE_LAYOUT,
            mamba_cache_mode=args.mamba_cache_mode,
            mamba_block_size=args.mamba_block_size,
            mamba_cache_dtype=args.mamba_cache_dtype,
            mamba_ssm_cache_dtype=args.mamba_ssm_cache_dtype,
        ),
    )


def _constraints(backend: str | None, specs: Mapping[str, Any]) -> dict[str, BackendConstraints]:
    """What the named backend reads, for every layer with slots; nothing where none is named."""
    if backend is None:
        return {}
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, resolve_backend
    from vllm.v1.kv_cache.resolver import BackendConstraints

    cls = resolve_backend(AttentionBackendEnum.from_name(backend))
    return {
        name: BackendConstraints(
            backend=cls.get_name(),
            layouts=cls.supported_kv_cache_layouts(),
            kernel_block_sizes=tuple(cls.get_supported_kernel_block_sizes(spec)),
        )
        for name, spec in specs.items()
        if spec.uses_slot_mapping
    }


def plan(args: argparse.Namespace) -> tuple[KVCacheConfig, VllmConfig]:
    """The plan of one rank, and the settings it was made for.

    Without --max-model-len the longest request is shortened to what fits into --memory.

    Raises:
        ConfigError, CapacityError: as ``vllm serve`` would at its start.
    """
    from vllm.distributed.kv_transfer.movement import movement_of
    from vllm.model_executor.models.cache_declarations import declare_kv_caches
    from vllm.v1.kv_cache.declare import check_skipped_layers
    from vllm.v1.kv_cache.planner import longest_that_fits, plan_kv_cache, resolve_layout

    vllm_config = _configure(args)
    specs = declare_kv_caches(vllm_config)
    check_skipped_layers(specs, vllm_config)
    movement: CacheMovement | None = movement_of(args.connector) if args.connector else None
    limits = _constraints(args.attention_backend, specs)
    if args.max_model_len is None and any(spec.page_size_bytes for spec in specs.values()):
        resolved = resolve_layout(specs, vllm_config, limits, movement)
        num_blocks = args.memory // resolved.grouping.bytes_per_block
        fits = longest_that_fits(resolved, vllm_config, num_blocks)
        if 0 < fits < vllm_config.model_config.max_model_len:
            model = replace(vllm_config.model_config, max_model_len=fits)
            vllm_config = replace(vllm_config, model_config=model)
            specs = declare_kv_caches(vllm_config)
    return plan_kv_cache(vllm_config, specs, args.memory, limits, movement), vllm_config


def predict_transfer(config: KVCacheConfig, vllm_config: VllmConfig) -> dict[str, Any]:
    """What fetching the longest request from a like engine takes, its blocks scattered."""
    from vllm.distributed.kv_transfer.costs import TRANSPORTS, route
    from vllm.distributed.kv_transfer.plan import plan_transfer
    from vllm.v1.kv_cache.descriptors import describe
    from vllm.v1.kv_cache.rearrange import Shard
    from vllm.v1.kv_cache.runs import regions

    descriptor = describe(config)
    heads = {
        layer.name: layer.head_axis.count if layer.head_axis else None
        for layer in descriptor.layers
    }
    plan = plan_transfer(descriptor, descriptor, Shard(), Shard(), heads)
    tokens = vllm_config.model_config.max_model_len
    descriptors = num_bytes = 0
    for table in plan.tables:
        units = -(-tokens // table.tokens_per_unit) if table.tokens_per_unit else 1
        descriptors += units * len(table.lanes)
        num_bytes += units * table.bytes_per_unit
    facts: dict[str, Any] = {
        "transfer_regions": len(regions(config)),
        "transfer_tokens": tokens,
        "transfer_descriptors": descriptors,
        "transfer_bytes": num_bytes,
    }
    for name, costs in TRANSPORTS.items():
        found = route(costs, descriptors, num_bytes, costs.slot_bytes, mapped=True)
        facts[f"transfer_over_{name}"] = found.way
        facts[f"transfer_ms_over_{name}"] = {
            way: round(seconds * 1e3, 2) for way, seconds in found.seconds.items()
        }
    return facts


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from vllm.v1.kv_cache.explain import build_report

    config, vllm_config = plan(args)
    report = build_report(config, vllm_config)
    model = vllm_config.model_config
    facts = {
        "model": args.model,
        "architecture": model.architecture,
        "dtype": model.dtype_name,
        "kv_cache_dtype": args.kv_cache_dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
    }
    if args.connector:
        facts.update(predict_transfer(config, vllm_config))
    if args.json:
        sys.stdout.write(json.dumps({**facts, **report.to_dict()}, indent=2) + "\n")
        return 0
    from rich.console import Console

    from vllm.v1.kv_cache.explain import render_report
    from vllm.v1.kv_cache.picture import block_maps, render_maps

    console = Console(highlight=False)
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    console.print(render_report(report))
    console.print(render_maps(block_maps(config)))
    return 0
