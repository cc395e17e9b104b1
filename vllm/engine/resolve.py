"""What an option that was left open, or given in words, comes to on this model and machine.

Pure functions of plain values; ``EngineArgs.create_engine_config`` feeds them. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.config.model import GENERATION_DEFAULTS
from vllm.errors import CapacityError, ConfigError, UnsupportedError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.flags import nearest
from vllm.utils.system import format_bytes

__all__ = [
    "DEFAULT_MAX_NUM_BATCHED_TOKENS",
    "DEFAULT_MAX_NUM_SEQS",
    "check_tensor_parallel",
    "generation_defaults",
    "kv_bytes_per_token",
    "kv_pool_bytes",
    "resolve_async_scheduling",
    "resolve_dtype",
    "resolve_executor_backend",
    "resolve_max_model_len",
    "resolve_max_num_batched_tokens",
]

AUTO = -1
"""--max-model-len auto: the longest request that the cache can hold."""

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
"""A step this long keeps the matrix units busy, and other requests wait for one step only."""

_LENGTH_WITHOUT_LIMIT = 2048
_FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_DTYPE_WORDS = {"half": "float16", "float": "float32"}


def resolve_dtype(
    requested: str,
    checkpoint: str | None,
    *,
    device_type: str,
    supported: tuple[str, ...],
    cpu_flags: frozenset[str] = frozenset(),
) -> str:
    """The model's dtype: "bfloat16", "float16" or "float32".

    "auto" is the checkpoint's dtype. A float32 checkpoint (or one that names none) runs in the
    best dtype of the device; on a CPU that is bfloat16 only where it multiplies bfloat16 itself.

    Args:
        checkpoint: dtype that the model's configuration names.
        supported: dtypes of the platform, best first.
        cpu_flags: instruction sets, for the CPU.

    Raises:
        ConfigError: the platform has no such dtype.
    """
    dtype = _DTYPE_WORDS.get(requested, requested)
    if dtype == "auto":
        dtype = checkpoint or "float32"
        if dtype not in supported:
            dtype = supported[0]
        elif dtype == "float32":
            slow = device_type == "cpu" and not cpu_flags & _FAST_BF16
            dtype = "float32" if slow else supported[0]
    if dtype not in supported:
        raise ConfigError(
            f"--dtype must be one of {', '.join(supported)} on this device, not {requested!r}",
            parameter="dtype",
            value=requested,
        )
    return dtype


def resolve_max_model_len(
    requested: int | None, limit: int | None, *, fitting_tokens: int | None = None
) -> int:
    """Tokens of one request, prompt and output together, at most.

    Args:
        requested: --max-model-len; None for the model's limit, ``AUTO`` for what the cache holds.
        limit: the model's own, None where its configuration names none.
        fitting_tokens: what the KV cache can hold of one request, None where not known yet.

    Raises:
        ConfigError: longer than the model's limit, or ``AUTO`` with an unknown cache size.
    """
    if requested is None:
        return limit or _LENGTH_WITHOUT_LIMIT
    if requested == AUTO:
        if fitting_tokens is None:
            raise ConfigError(
                "--max-model-len auto needs a cache of known size: set --kv-cache-memory-bytes, "
                "or give --max-model-len a number",
                parameter="max_model_len",
            )
        return min(limit or fitting_tokens, fitting_tokens)
    if limit is not None and requested > limit:
        raise ConfigError(
            f"--max-model-len {requested} is longer than the model's limit of {limit} tokens; "
            f"use at most {limit} (or stretch the model's RoPE with --hf-overrides)",
            parameter="max_model_len",
            value=requested,
        )
    return requested


def resolve_max_num_batched_tokens(
    requested: int | None,
    *,
    max_model_len: int,
    max_num_seqs: int,
    chunked_prefill: bool,
    default: int = DEFAULT_MAX_NUM_BATCHED_TOKENS,
) -> int:
    """Tokens of one step, at most.

    Args:
        default: the platform's.

    Raises:
        ConfigError: fewer than --max-num-seqs, or than --max-model-len without chunked prefill.
    """
    if requested is None:
        budget = max(default, max_num_seqs)
        return budget if chunked_prefill else max(budget, max_model_len)
    if requested < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {requested} must be at least --max-num-seqs "
            f"({max_num_seqs}); raise it or lower --max-num-seqs",
            parameter="max_num_batched_tokens",
            value=requested,
        )
    if not chunked_prefill and requested < max_model_len:
        raise ConfigError(
            f"--max-num-batched-tokens {requested} must be at least --max-model-len "
            f"({max_model_len}) with --no-enable-chunked-prefill",
            parameter="max_num_batched_tokens",
            value=requested,
        )
    # More could never be scheduled, and would only take memory.
    return min(requested, max_num_seqs * max_model_len)


def resolve_async_scheduling(
    requested: bool | None, *, runs_beside_host: bool, obstacles: Sequence[str]
) -> bool:
    """Whether a step is scheduled and launched while the one before it runs.

    Args:
        requested: --async-scheduling; None where it was left open.
        runs_beside_host: the platform's steps leave the host free.
        obstacles: options in use that need the tokens of each step before the next.

    Raises:
        ConfigError: it was asked for and cannot be.
    """
    reasons = list(obstacles)
    if not runs_beside_host:
        reasons.insert(0, "this device, whose steps are the host's own work")
    if requested and reasons:
        raise ConfigError(
            f"--async-scheduling does not go with {', '.join(reasons)}; leave it out",
            parameter="async_scheduling",
            value=True,
        )
    return requested is not False and not reasons


def resolve_executor_backend(requested: str | None, num_workers: int) -> str:
    """ "uni", "mp" or "ray".

    Raises:
        ConfigError: "uni" with several workers.
    """
    if requested == "uni" and num_workers > 1:
        raise ConfigError(
            f"--distributed-executor-backend uni runs one worker, and --tensor-parallel-size "
            f"{num_workers} needs {num_workers}; use mp",
            parameter="distributed_executor_backend",
            value=requested,
        )
    return requested or ("uni" if num_workers == 1 else "mp")


def check_tensor_parallel(size: int, text_config: Any) -> None:
    """Refuse a number of workers that the model's attention heads cannot be shared out to.

    Query heads must divide; KV heads must divide too, or be held by several workers each. What
    else a model has to share out, its layers check.

    Raises:
        ConfigError: naming the sizes that work.
    """
    query_heads = getattr(text_config, "num_attention_heads", None)
    if size == 1 or not isinstance(query_heads, int):
        return
    kv_heads = getattr(text_config, "num_key_value_heads", None) or query_heads

    def works(count: int) -> bool:
        shared = kv_heads % count == 0 or count % kv_heads == 0
        return query_heads % count == 0 and shared

    if not works(size):
        sizes = [str(count) for count in range(1, query_heads + 1) if works(count)]
        raise ConfigError(
            f"--tensor-parallel-size {size} cannot share out the {query_heads} attention heads "
            f"and {kv_heads} KV heads of this model; sizes that can: {', '.join(sizes)}",
            parameter="tensor_parallel_size",
            value=size,
        )


def kv_bytes_per_token(
    *, num_layers: int, num_kv_heads: int, head_size: int, cache_dtype: str, model_dtype: str
) -> int:
    """Bytes of keys and values of one token over all layers, as if every layer were full."""
    from vllm.v1.kv_cache.attention_specs import FullAttentionSpec
    from vllm.v1.kv_cache.declare import kv_cache_storage

    dtype, quant = kv_cache_storage(cache_dtype, model_dtype)
    layer = FullAttentionSpec(
        block_size=1,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        kv_quant_mode=quant,
    )
    return num_layers * layer.page_size_bytes


def kv_pool_bytes(
    requested: int | None, space_gib: float | None, default_gib: float, available: int
) -> int:
    """Bytes of the CPU's KV pool.

    Args:
        requested: --kv-cache-memory-bytes.
        space_gib: VLLM_CPU_KVCACHE_SPACE, where it is set and not 0.
        default_gib: used where neither is given; shrinks to half of ``available``.
        available: bytes that can be allocated now.

    Raises:
        CapacityError: more was asked for than there is.
    """
    if requested is not None:
        asked, name = requested, f"--kv-cache-memory-bytes {requested}"
    elif space_gib:
        asked, name = int(space_gib * 2**30), f"VLLM_CPU_KVCACHE_SPACE={space_gib:g}"
    else:
        return min(int(default_gib * 2**30), available // 2)
    if asked > available:
        raise CapacityError(
            f"{name} asks for {format_bytes(asked)} of KV cache, but {format_bytes(available)} of "
            f"memory is available; set --kv-cache-memory-bytes or VLLM_CPU_KVCACHE_SPACE (GiB) "
            f"below that"
        )
    return asked


def generation_defaults(
    source: str, from_model: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Default sampling parameters: --generation-config, then --override-generation-config.

    Args:
        source: "auto" (the model's), "vllm" (none) or a directory with generation_config.json.

    Raises:
        ConfigError: no such directory or file, not JSON, an unknown key in the overrides, or a
            value that no request could have.
    """
    if source == "auto":
        values = dict(from_model)
    elif source == "vllm":
        values = {}
    else:
        values = _read_generation_config(Path(source))
    for key in overrides:
        if key not in GENERATION_DEFAULTS:
            guess = nearest(key, GENERATION_DEFAULTS)
            hint = f"did you mean {guess}?" if guess else f"known: {', '.join(GENERATION_DEFAULTS)}"
            raise ConfigError(
                f"--override-generation-config has no key {key!r}; {hint}",
                parameter="override_generation_config",
                value=key,
            )
    values = values | overrides
    for key in GENERATION_DEFAULTS:
        if values.get(key) is not None:
            _check_generation_default(key, values[key], overridden=key in overrides)
    _check_ends(values.get("eos_token_id"))
    return values


def _check_ends(eos_token_id: Any) -> None:
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if eos_token_id is not None and not all(type(token_id) is int for token_id in ids):
        raise ConfigError(
            "generation_config.json: eos_token_id must be a token id or a list of them, not "
            f"{eos_token_id!r}; --generation-config vllm leaves that file out",
            parameter="generation_config",
        )


def _check_generation_default(key: str, value: Any, *, overridden: bool) -> None:
    name = "max_tokens" if key == "max_new_tokens" else key
    try:
        SamplingParams(**{name: value})
    except VLLMValidationError as error:
        source = "--override-generation-config" if overridden else "generation_config.json"
        hint = "" if overridden else "; --generation-config vllm leaves that file out"
        raise ConfigError(
            f"{source}: {error}{hint}", parameter="override_generation_config", value=value
        ) from None


def _read_generation_config(directory: Path) -> dict[str, Any]:
    file = directory / "generation_config.json" if directory.is_dir() else directory
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--generation-config must be auto, vllm or a directory with generation_config.json; "
            f"{str(file)!r} cannot be read: {error}",
            parameter="generation_config",
            value=str(directory),
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--generation-config {file}: not a JSON object", parameter="generation_config"
        )
    return values


_EXPANDED_BY = {"mxfp4": ("gpt_oss",)}
"""Formats of weights -> model types whose loading expands them."""


def refuse_quantized(model: str, hf_config: Any) -> None:
    """Refuse a checkpoint whose weights are stored in a format that no loader expands.

    Raises:
        UnsupportedError: the configuration's ``quantization_config`` names such a format.
    """
    quantization = getattr(hf_config, "quantization_config", None)
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if getattr(hf_config, "model_type", None) in _EXPANDED_BY.get(str(method), ()):
        return
    raise UnsupportedError(
        f"--model {model}: its weights are quantised ({method}); vLLM has this; this engine does "
        "not yet (unquantised safetensors and GGUF files work)",
        parameter="model",
        value=model,
    )
