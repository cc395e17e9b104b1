"""Every engine option once: name, type, default, group and help.

The fields are the flags of ``vllm serve`` and the keyword arguments of ``LLM``. Knows nothing of
what becomes of them (``arg_utils``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.engine import resolve
from vllm.utils.flags import Kind, arg

__all__ = ["EngineOptions"]


@dataclass(kw_only=True)
class EngineOptions:
    """Names and defaults are vLLM's; ``EngineArgs`` checks the values."""

    # ModelConfig
    model: str = arg(
        "Qwen/Qwen3-0.6B",
        "ModelConfig",
        Kind.STR,
        "Model: a Hugging Face directory, a .gguf file, a short name (smollm2) or a hub id.",
    )
    tokenizer: str | None = arg(
        None,
        "ModelConfig",
        Kind.STR,
        "Tokenizer: a directory, a .gguf file or a hub id; by default the model's own.",
    )
    tokenizer_mode: str = arg(
        "auto",
        "ModelConfig",
        Kind.STR,
        "How the tokenizer is loaded.",
        choices=("auto", "hf"),
        later=("slow", "mistral", "custom", "deepseek_v32"),
    )
    skip_tokenizer_init: bool = arg(
        False,
        "ModelConfig",
        Kind.SWITCH,
        "Load no tokenizer: prompts are token ids, and outputs carry no text.",
    )
    trust_remote_code: bool = arg(
        False,
        "ModelConfig",
        Kind.SWITCH,
        "Run Python code that comes with a model.",
    )
    revision: str | None = arg(
        None,
        "ModelConfig",
        Kind.STR,
        "Branch, tag or commit of a hub model.",
    )
    tokenizer_revision: str | None = arg(
        None,
        "ModelConfig",
        Kind.STR,
        "Branch, tag or commit of a hub tokenizer.",
    )
    dtype: str = arg(
        "auto",
        "ModelConfig",
        Kind.STR,
        "Data type of weights and activations. auto: the checkpoint's; float32 checkpoints run in "
        "bfloat16 where the device multiplies it.",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    max_model_len: int | None = arg(
        None,
        "ModelConfig",
        Kind.SIZE,
        "Tokens of one request, prompt and output together, at most; by default the model's "
        "limit. 8k is 8000, 8K is 8192; auto or -1: the longest that fits in the KV cache.",
        minimum=1,
        words=(("auto", -1), ("-1", -1)),
    )
    quantization: str | None = arg(
        None,
        "ModelConfig",
        Kind.STR,
        "Storage format of the weights.",
        short="-q",
        choices=("gguf",),
        later=(
            "awq",
            "awq_marlin",
            "gptq",
            "gptq_marlin",
            "fp8",
            "bitsandbytes",
            "compressed-tensors",
            "modelopt",
            "mxfp4",
            "torchao",
            "quark",
        ),
    )
    seed: int = arg(
        0, "ModelConfig", Kind.INT, "Seed of the random numbers.", minimum=0, maximum=2**63 - 1
    )
    hf_overrides: dict[str, Any] = arg(
        {},
        "ModelConfig",
        Kind.JSON,
        "Values that replace those of the model's config.json.",
    )
    generation_config: str = arg(
        "auto",
        "ModelConfig",
        Kind.STR,
        "Where default sampling parameters come from: auto (the model), vllm (none), or a "
        "directory with generation_config.json.",
    )
    override_generation_config: dict[str, Any] = arg(
        {},
        "ModelConfig",
        Kind.JSON,
        "Default sampling parameters that replace the model's.",
    )
    enforce_eager: bool = arg(
        False,
        "ModelConfig",
        Kind.SWITCH,
        "Never capture or compile graphs.",
    )
    enable_sleep_mode: bool = arg(
        False,
        "ModelConfig",
        Kind.SWITCH,
        "Let the engine be put to sleep, which gives back the memory of its KV cache and weights.",
    )
    max_logprobs: int = arg(
        20,
        "ModelConfig",
        Kind.INT,
        "Largest logprobs of a request; -1: no limit.",
        minimum=-1,
    )
    logprobs_mode: str = arg(
        "raw_logprobs",
        "ModelConfig",
        Kind.STR,
        "What logprobs are: before (raw) or after (processed) the sampling parameters applied.",
        choices=("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    )
    runner: str = arg(
        "auto",
        "ModelConfig",
        Kind.STR,
        "What the model is run for.",
        choices=("auto", "generate"),
        later=("pooling", "draft"),
    )
    served_model_name: list[str] | str | None = arg(
        None,
        "ModelConfig",
        Kind.LIST,
        "Names that requests may use; the first is shown in answers. By default --model.",
    )
    disable_sliding_window: bool = arg(
        False,
        "ModelConfig",
        Kind.SWITCH,
        "Cap the context at the model's sliding window, so that no layer needs one.",
    )
    logits_processors: list[str] | None = arg(
        None,
        "ModelConfig",
        Kind.LIST,
        "Custom logits processors, each as module:Class.",
    )

    # LoadConfig
    load_format: str = arg(
        "auto",
        "LoadConfig",
        Kind.STR,
        "Format of the weights: auto, safetensors, gguf, dummy (random), or one a plug-in added.",
    )
    download_dir: str | None = arg(
        None,
        "LoadConfig",
        Kind.STR,
        "Where hub downloads are kept.",
    )
    use_tqdm_on_load: bool = arg(
        True,
        "LoadConfig",
        Kind.SWITCH,
        "Show a progress bar while weights load.",
    )
    # AttentionConfig
    attention_backend: str | None = arg(
        None,
        "AttentionConfig",
        Kind.STR,
        "Attention backend; by default the platform chooses.",
    )

    # ParallelConfig
    distributed_executor_backend: str | None = arg(
        None,
        "ParallelConfig",
        Kind.STR,
        "How workers run: uni (in the engine's process, the only one), mp (processes of this "
        "host) or ray (actors, on several hosts). Default: uni for one worker, mp for more.",
        choices=("uni", "mp", "ray"),
        later=("external_launcher",),
    )
    tensor_parallel_size: int = arg(
        1,
        "ParallelConfig",
        Kind.INT,
        "Workers that share every layer's heads and columns.",
        short="-tp",
        minimum=1,
    )
    worker_cls: str = arg(
        "auto",
        "ParallelConfig",
        Kind.STR,
        "Dotted path of the worker class.",
    )

    # CacheConfig
    block_size: int | None = arg(
        None,
        "CacheConfig",
        Kind.INT,
        "Tokens of one KV-cache block; by default the platform's.",
        minimum=1,
    )
    gpu_memory_utilization: float = arg(
        0.92,
        "CacheConfig",
        Kind.FLOAT,
        "Share of a GPU's memory that the engine may use.",
        minimum=0.01,
        maximum=1.0,
    )
    kv_cache_memory_bytes: int | None = arg(
        None,
        "CacheConfig",
        Kind.SIZE,
        "Bytes of KV cache (4g is decimal, 4G and 4Gi binary); on the CPU the default is "
        "VLLM_CPU_KVCACHE_SPACE GiB.",
        minimum=1,
    )
    kv_cache_dtype: str = arg(
        "auto",
        "CacheConfig",
        Kind.STR,
        "Data type of the KV cache; auto: the model's.",
        choices=(
            "auto",
            "bfloat16",
            "float16",
            "float32",
            "fp8",
            "fp8_e4m3",
            "fp8_e5m2",
            "int8_per_token_head",
            "fp8_per_token_head",
            "int4_per_token_head",
            "nvfp4",
            "turboquant_k8v4",
            "turboquant_4bit_nc",
            "turboquant_k3v4_nc",
            "turboquant_3bit_nc",
        ),
        later=("fp8_inc", "fp8_ds_mla"),
    )
    kv_cache_dtype_skip_layers: list[str] | None = arg(
        None,
        "CacheConfig",
        Kind.LIST,
        "Layers that keep the model's data type: their numbers, names, or sliding_window.",
    )
    calculate_kv_scales: bool = arg(
        False,
        "CacheConfig",
        Kind.SWITCH,
        "Find the scales of an fp8 or nvfp4 cache by a run at start, where the checkpoint brings "
        "none.",
    )
    enable_prefix_caching: bool | None = arg(
        None,
        "CacheConfig",
        Kind.SWITCH,
        "Reuse the cache of prompts that begin alike (default).",
    )
    prefix_caching_hash_algo: str = arg(
        "sha256",
        "CacheConfig",
        Kind.STR,
        "Hash that names cached blocks.",
        choices=("sha256", "sha256_cbor", "xxhash", "xxhash_cbor"),
    )
    num_gpu_blocks_override: int | None = arg(
        None,
        "CacheConfig",
        Kind.INT,
        "Blocks of the KV cache, whatever the memory allows.",
        minimum=1,
    )
    mamba_cache_mode: str | None = arg(
        None,
        "CacheConfig",
        Kind.STR,
        "Which states of recurrent layers are kept for prefix reuse: none; align: those at block "
        "boundaries where a step ended; all: those at every block boundary. By default align "
        "where --enable-prefix-caching is given, else none.",
        choices=("none", "align", "all"),
    )
    mamba_block_size: int | None = arg(
        None,
        "CacheConfig",
        Kind.INT,
        "Tokens between two states that are kept; by default the block size.",
        minimum=1,
    )
    mamba_cache_dtype: str = arg(
        "auto",
        "CacheConfig",
        Kind.STR,
        "Data type of convolution states; auto: the model's.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    mamba_ssm_cache_dtype: str = arg(
        "auto",
        "CacheConfig",
        Kind.STR,
        "Data type of recurrent states; auto: that of convolution states.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    kv_offloading_size: float | None = arg(
        None,
        "CacheConfig",
        Kind.FLOAT,
        "GiB of host memory, over all ranks, that blocks are offloaded to: short for a "
        "--kv-transfer-config with OffloadingConnector.",
        minimum=0,
    )
    kv_offloading_backend: str = arg(
        "native",
        "CacheConfig",
        Kind.STR,
        "What --kv-offloading-size uses.",
        choices=("native",),
        later=("lmcache",),
    )

    # ObservabilityConfig and logs
    disable_log_stats: bool = arg(
        False,
        "top level",
        Kind.SWITCH,
        "Log no throughput statistics.",
    )

    # SchedulerConfig
    max_num_seqs: int | None = arg(
        None,
        "SchedulerConfig",
        Kind.INT,
        f"Requests in one step, at most; default {resolve.DEFAULT_MAX_NUM_SEQS}.",
        minimum=1,
        maximum=65_536,
    )
    max_num_batched_tokens: int | None = arg(
        None,
        "SchedulerConfig",
        Kind.SIZE,
        f"Tokens of one step, at most; default {resolve.DEFAULT_MAX_NUM_BATCHED_TOKENS}.",
        minimum=1,
    )
    enable_chunked_prefill: bool | None = arg(
        None,
        "SchedulerConfig",
        Kind.SWITCH,
        "Compute long prompts over several steps (default).",
    )
    scheduling_policy: str = arg(
        "fcfs",
        "SchedulerConfig",
        Kind.STR,
        "Order of waiting requests: fcfs (arrival) or priority (smaller first, then arrival).",
        choices=("fcfs", "priority"),
    )
    stream_interval: int = arg(
        1,
        "SchedulerConfig",
        Kind.INT,
        "Tokens between two parts of a stream.",
        minimum=1,
    )
    async_scheduling: bool | None = arg(
        None,
        "SchedulerConfig",
        Kind.SWITCH,
        "Schedule and launch a step while the one before it runs. Default: on a GPU, unless a "
        "connector, a scheduler class or custom logits processors are in use.",
    )
    max_num_queued_reqs: int | None = arg(
        None,
        "SchedulerConfig",
        Kind.INT,
        "Requests that may wait; one more is answered 503. Default: no limit.",
        minimum=0,
    )
    long_prefill_token_threshold: int = arg(
        0,
        "SchedulerConfig",
        Kind.SIZE,
        "Largest chunk of one prompt in a step; 0: no limit.",
        minimum=0,
    )
    scheduler_cls: str | None = arg(
        None,
        "SchedulerConfig",
        Kind.STR,
        "Dotted path of the scheduler class.",
    )
    disable_hybrid_kv_cache_manager: bool = arg(
        False,
        "SchedulerConfig",
        Kind.SWITCH,
        "Treat layers of every kind as full attention when KV-cache blocks are managed.",
    )
    watermark: float = arg(
        0.0,
        "SchedulerConfig",
        Kind.FLOAT,
        "Share of blocks that stays free when a request is admitted.",
        minimum=0.0,
        maximum=1.0,
    )

    # VllmConfig
    attention_config: dict[str, Any] = arg(
        {},
        "VllmConfig",
        Kind.JSON,
        'Attention settings: {"backend": NAME}.',
    )
    structured_outputs_config: dict[str, Any] = arg(
        {},
        "VllmConfig",
        Kind.JSON,
        'Structured outputs: {"backend": "auto" | "xgrammar", "disable_any_whitespace": BOOL}.',
    )
    kv_transfer_config: dict[str, Any] | None = arg(
        None,
        "VllmConfig",
        Kind.JSON,
        'What moves KV blocks: {"kv_connector": NAME, "kv_role": "kv_producer" | "kv_consumer" | '
        '"kv_both", ...}.',
    )
    kv_events_config: dict[str, Any] | None = arg(
        None,
        "VllmConfig",
        Kind.JSON,
        'Publication of stored and removed blocks: {"enable_kv_cache_events": true, "publisher": '
        '"zmq", "endpoint": URL, ...}.',
    )
    additional_config: dict[str, Any] = arg(
        {},
        "VllmConfig",
        Kind.JSON,
        "Settings handed to plug-ins as they are.",
    )
