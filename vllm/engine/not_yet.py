"""Options of ``vllm serve`` and ``LLM`` that vLLM has and this engine does not have yet.

They are refused by name, never ignored. A value that asks for nothing (vLLM's default, or what
switches the feature off) passes. When a feature arrives, its line moves to ``options.py``.
``GONE`` has options of older releases of vLLM, and what to do in place of them.
"""

from collections.abc import Iterator

from vllm.utils.flags import NotYet

__all__ = ["GONE", "NOT_YET"]

# group -> switches: the bare name asks for the feature, ``--no-NAME`` does not.
_SWITCHES: dict[str, str] = {
    "top level": "aggregate-engine-logging grpc headless",
    "Frontend": (
        "cohere-is-reasoning-model enable-flash-late-interaction enable-offline-docs "
        "enable-per-request-metrics enable-scale-out enable-ssl-refresh tokens-only "
        "trust-request-mm-kwargs"
    ),
    "ModelConfig": (
        "allow-deprecated-quantization enable-cumem-allocator enable-nccl-comm-suspend "
        "enable-prompt-embeds enable-return-routed-experts enable-trace-replay "
        "return-sampling-mask sleep-mode-offload-cudagraph sleep-preserve-parameter-names "
        "use-fp64-gumbel"
    ),
    "MambaConfig": "enable-mamba-cache-stochastic-rounding",
    "ParallelConfig": (
        "data-parallel-external-lb data-parallel-hybrid-lb data-parallel-multi-port-external-lb "
        "dcp-q-replicate disable-nccl-for-dp-synchronization enable-batch-sharded-sampling "
        "enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel "
        "enable-fault-tolerance enable-hc-sp enable-shm-tensor-arena numa-bind "
        "ray-workers-use-nsight"
    ),
    "CacheConfig": (
        "enable-mamba-shared-prefix-checkpoint kv-sharing-fast-prefill swa-bounded-replay "
        "use-replayssm"
    ),
    "MultiModalConfig": (
        "enable-mm-embeds interleave-mm-strings mm-device-do-normalize mm-encoder-only"
    ),
    "LoRAConfig": (
        "enable-lora enable-mixed-moe-lora-format enable-moe-shared-loras "
        "enable-tower-connector-lora fully-sharded-loras specialize-active-lora"
    ),
    "ObservabilityConfig": (
        "cudagraph-metrics enable-layerwise-nvtx-tracing enable-logging-iteration-details "
        "enable-mfu-metrics jit-monitor-verbose kv-cache-metrics per-request-spec-decode-metrics"
    ),
    "SchedulerConfig": (
        "disable-chunked-mm-input long-prefill-token-threshold-adaptive scheduler-reserve-full-isl"
    ),
    "KernelConfig": "enable-flashinfer-autotune",
}

# group -> option -> values that ask for nothing, separated by "|".
_VALUES: dict[str, dict[str, str]] = {
    "top level": {
        "gdn-prefill-backend": "auto",
        "kda-decode-backend": "auto",
        "kda-prefill-backend": "auto",
    },
    "Frontend": {
        "anthropic-disabled-thinking-effort": "",
        "cohere-format": "",
        "data-parallel-supervisor-port": "",
        "dp-supervisor-probe-failure-threshold": "",
        "dp-supervisor-probe-interval-s": "",
        "dp-supervisor-probe-timeout-s": "",
        "fingerprint-mode": "",
        "fingerprint-value": "",
        "grpc-port": "",
        "lora-modules": "",
        "sse-keep-alive-interval": "0",
        "tool-server": "",
        "tool-strict-level": "",
    },
    "ModelConfig": {
        "allowed-local-media-path": "",
        "allowed-media-domains": "",
        "code-revision": "",
        "config-format": "auto|hf",
        "convert": "auto|none",
        "hf-config-path": "",
        "hf-token": "",
        "io-processor-plugin": "",
        "model-class-overrides": "{}",
        "model-impl": "auto|vllm",
        "pooler-config": "",
        "quantization-config": "",
        "renderer-num-workers": "1",
    },
    "LoadConfig": {
        "ignore-patterns": "",
        "model-loader-extra-config": "{}",
        "pt-load-map-location": "cpu",
        "safetensors-load-strategy": "lazy",
        "safetensors-prefetch-block-size": "",
        "safetensors-prefetch-num-threads": "",
    },
    "MambaConfig": {
        "mamba-backend": "auto",
        "mamba-cache-philox-rounds": "",
        "mamba-ssu-algorithm": "auto",
    },
    "ParallelConfig": {
        "all2all-backend": "",
        "cp-kv-cache-interleave-size": "1",
        "cpu-distributed-timeout-seconds": "",
        "data-parallel-address": "",
        "data-parallel-backend": "mp",
        "data-parallel-rank": "",
        "data-parallel-rpc-port": "",
        "data-parallel-size": "1",
        "data-parallel-size-local": "1",
        "data-parallel-start-rank": "0",
        "dbo-decode-token-threshold": "",
        "dbo-prefill-token-threshold": "",
        "dcp-comm-backend": "",
        "dcp-kv-cache-interleave-size": "1",
        "decode-context-parallel-size": "1",
        "device-ids": "",
        "distributed-timeout-seconds": "",
        "dp-sync-interval": "",
        "elastic-ep-max-dp-size": "",
        "eplb-config": "{}",
        "expert-placement-strategy": "linear",
        "fault-tolerance-config": "{}",
        "master-addr": "127.0.0.1",
        "master-port": "29501",
        "max-parallel-loading-workers": "",
        "nnodes": "1",
        "node-rank": "0",
        "numa-bind-cpus": "",
        "numa-bind-nodes": "",
        "pipeline-parallel-size": "1",
        "prefill-context-parallel-size": "1",
        "ubatch-size": "0",
        "worker-extension-cls": "",
    },
    "CacheConfig": {
        "prefix-cache-retention-interval": "",
        "prefix-match-unit": "",
        "replayssm-buffer-len": "",
    },
    "OffloadConfig": {
        "cpu-offload-gb": "0|0.0",
        "cpu-offload-params": "",
        "offload-backend": "auto",
        "offload-group-size": "0",
        "offload-num-in-group": "1",
        "offload-params": "",
        "offload-prefetch-step": "1",
    },
    "MultiModalConfig": {
        "limit-mm-per-prompt": "{}",
        "media-io-kwargs": "{}",
        "mm-encoder-attn-backend": "",
        "mm-encoder-attn-dtype": "",
        "mm-encoder-fp8-scale-path": "",
        "mm-encoder-fp8-scale-save-margin": "",
        "mm-encoder-fp8-scale-save-path": "",
        "mm-encoder-tp-mode": "weights",
        "mm-hasher-algorithm": "blake3",
        "mm-ipc-gpu-memory-gb": "0",
        "mm-processor-cache-gb": "4|0",
        "mm-processor-cache-type": "lru",
        "mm-processor-device": "",
        "mm-processor-kwargs": "{}",
        "mm-shm-cache-max-object-size-mb": "128",
        "mm-tensor-ipc": "",
        "video-pruning-method": "",
        "video-pruning-rate": "0",
    },
    "LoRAConfig": {
        "default-mm-loras": "{}",
        "lora-dtype": "auto",
        "lora-target-modules": "",
        "max-cpu-loras": "",
        "max-lora-cls-labels": "",
        "max-lora-rank": "16",
        "max-loras": "1",
    },
    "ObservabilityConfig": {
        "collect-detailed-traces": "",
        "custom-histogram-buckets": "",
        "jit-monitor-mode": "",
        "kv-cache-metrics-sample": "",
        "otlp-traces-endpoint": "",
        "show-hidden-metrics-for-version": "",
    },
    "LoggingConfig": {"logging-config": "{}"},
    "SchedulerConfig": {
        "max-num-active-seqs": "",
        "max-num-queued-tokens": "",
        "max-num-scheduled-tokens": "",
        "prefill-schedule-interval": "",
    },
    "CompilationConfig": {
        "cudagraph-capture-sizes": "",
        "max-cudagraph-capture-size": "0",
    },
    "KernelConfig": {
        "ir-op-priority": "{}",
        "linear-backend": "auto",
        "moe-backend": "auto",
        "sparse-indexer-topk-backend": "auto",
    },
    "VllmConfig": {
        "aux-output-config": "{}",
        "compilation-config": "{}|0",
        "diffusion-config": "{}",
        "ec-manager-config": "{}",
        "ec-transfer-config": "{}",
        "engram-config": "{}",
        "kernel-config": "{}",
        "optimization-level": "2|0",
        "performance-mode": "balanced",
        "profiler-config": "{}",
        "reasoning-config": "{}",
        "spec-method": "",
        "spec-model": "",
        "spec-tokens": "0",
        "speculative-config": "{}",
        "watermark-config": "{}",
        "weight-transfer-config": "{}",
    },
}

# Switches where asking for less is what this engine does anyway, and their harmless spellings.
_PASSING_SWITCHES: dict[str, tuple[str, tuple[str, ...]]] = {
    "disable-cascade-attn": ("ModelConfig", ("--disable-cascade-attn",)),
    "disable-custom-all-reduce": (
        "ParallelConfig",
        ("--disable-custom-all-reduce", "--no-disable-custom-all-reduce"),
    ),
    # Of models that see or hear, the language model is served, and nothing of them is profiled.
    "language-model-only": (
        "MultiModalConfig",
        ("--language-model-only", "--no-language-model-only"),
    ),
    "skip-mm-profiling": ("MultiModalConfig", ("--skip-mm-profiling", "--no-skip-mm-profiling")),
}

_SHORT = {
    "compilation-config": "-cc",
    "data-parallel-address": "-dpa",
    "data-parallel-rank": "-dpn",
    "data-parallel-size": "-dp",
    "enable-expert-parallel": "-ep",
    "nnodes": "-n",
    "node-rank": "-r",
    "optimization-level": "-O",
    "pipeline-parallel-size": "-pp",
    "speculative-config": "-sc",
}


def _entries() -> Iterator[NotYet]:
    for group, names in _SWITCHES.items():
        for name in names.split():
            yield NotYet(
                name=name.replace("-", "_"),
                group=group,
                takes_value=False,
                off=(f"--no-{name}",),
                short=_SHORT.get(name),
            )
    for name, (group, spellings) in _PASSING_SWITCHES.items():
        yield NotYet(name=name.replace("-", "_"), group=group, takes_value=False, off=spellings)
    for group, options in _VALUES.items():
        for name, off in options.items():
            yield NotYet(
                name=name.replace("-", "_"),
                group=group,
                takes_value=True,
                off=tuple(off.split("|")) if off else (),
                short=_SHORT.get(name),
                # No images at all is what this engine takes.
                off_at_zero=name == "limit-mm-per-prompt",
            )


NOT_YET: dict[str, NotYet] = {entry.name: entry for entry in _entries()}
"""By name with underscores, as keyword arguments are spelt."""

_LEAVE_OUT = "leave it out"
_NO_SPECULATION = "use --speculative-config, which this engine does not have yet"
_ROPE = """use --hf-overrides, such as --hf-overrides '{"rope_parameters": {...}}'"""

GONE: dict[str, str] = {
    "cuda-graph-sizes": "its successor --cudagraph-capture-sizes is not here yet; leave it out",
    "device": "the device is found at start; leave it out",
    "disable-async-output-proc": "use --no-async-scheduling",
    "disable-frontend-multiprocessing": _LEAVE_OUT,
    "disable-log-requests": "requests are logged only with --enable-log-requests; leave it out",
    "disable-mm-preprocessor-cache": "use --mm-processor-cache-gb 0",
    "enable-reasoning": "--reasoning-parser alone switches it on",
    "engine-use-ray": "use --distributed-executor-backend ray",
    "guided-decoding-backend": "use --structured-outputs-config.backend",
    "guided-decoding-disable-any-whitespace": (
        "use --structured-outputs-config.disable_any_whitespace true"
    ),
    "guided-decoding-disable-fallback": _LEAVE_OUT,
    "logits-processor-pattern": "name processors with --logits-processors",
    "lora-extra-vocab-size": _LEAVE_OUT,
    "max-context-len-to-capture": _LEAVE_OUT,
    "max-seq-len-to-capture": _LEAVE_OUT,
    "multi-step-stream-outputs": "use --stream-interval",
    "num-lookahead-slots": _LEAVE_OUT,
    "num-scheduler-steps": "use --async-scheduling",
    "num-speculative-tokens": _NO_SPECULATION,
    "override-pooler-config": "its successor --pooler-config is not here yet; leave it out",
    "preemption-mode": "preempted requests are computed again; leave it out",
    "rope-scaling": _ROPE,
    "rope-theta": _ROPE,
    "scheduler-delay-factor": _LEAVE_OUT,
    "speculative-model": _NO_SPECULATION,
    "swap-space": "preempted requests are computed again, not swapped out; leave it out",
    "task": "use --runner",
    "tokenizer-pool-size": _LEAVE_OUT,
    "tokenizer-pool-type": _LEAVE_OUT,
    "use-v2-block-manager": _LEAVE_OUT,
    "worker-use-ray": "use --distributed-executor-backend ray",
}
"""By option without its dashes: what follows "vLLM no longer has this;"."""
