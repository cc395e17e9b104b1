"""Facts about vLLM 0.32: the options of ``vllm serve`` by group, and defaults of many."""

FLAGS_BY_GROUP = {
    "top level": """
        aggregate-engine-logging api-server-count config disable-log-stats
        enable-log-requests fail-on-environ-validation gdn-prefill-backend grpc headless
        kda-decode-backend kda-prefill-backend shutdown-timeout help
    """,
    "Frontend": """
        allow-credentials allowed-headers allowed-methods allowed-origins
        anthropic-disabled-thinking-effort api-key chat-template
        chat-template-content-format cohere-format cohere-is-reasoning-model
        data-parallel-supervisor-port default-chat-template-kwargs
        disable-access-log-for-endpoints disable-fastapi-docs disable-uvicorn-access-log
        dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s
        dp-supervisor-probe-timeout-s enable-auto-tool-choice enable-flash-late-interaction
        enable-force-include-usage enable-log-deltas enable-log-outputs enable-offline-docs
        enable-per-request-metrics enable-prompt-tokens-details enable-request-id-headers
        enable-scale-out enable-server-load-tracking enable-ssl-refresh
        enable-tokenizer-info-endpoint exclude-tools-when-tool-choice-none fingerprint-mode
        fingerprint-value grpc-port h11-max-header-count h11-max-incomplete-event-size host
        log-error-stack lora-modules max-log-len middleware port response-role
        return-tokens-as-token-ids root-path sse-keep-alive-interval ssl-ca-certs
        ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile tokens-only tool-call-parser
        tool-parser-plugin tool-server tool-strict-level trust-request-chat-template
        trust-request-mm-kwargs uds uvicorn-log-level
    """,
    "ModelConfig": """
        allow-deprecated-quantization allowed-local-media-path allowed-media-domains
        code-revision config-format convert disable-cascade-attn disable-sliding-window
        dtype enable-cumem-allocator enable-nccl-comm-suspend enable-prompt-embeds
        enable-return-routed-experts enable-sleep-mode enable-trace-replay enforce-eager
        generation-config hf-config-path hf-overrides hf-token io-processor-plugin
        logits-processors logprobs-mode max-logprobs max-model-len model
        model-class-overrides model-impl override-generation-config pooler-config
        quantization quantization-config renderer-num-workers return-sampling-mask revision
        runner seed served-model-name skip-tokenizer-init sleep-mode-offload-cudagraph
        sleep-preserve-parameter-names tokenizer tokenizer-mode tokenizer-revision
        trust-remote-code use-fp64-gumbel
    """,
    "LoadConfig": """
        download-dir ignore-patterns load-format model-loader-extra-config
        pt-load-map-location safetensors-load-strategy safetensors-prefetch-block-size
        safetensors-prefetch-num-threads use-tqdm-on-load
    """,
    "AttentionConfig": """
        attention-backend
    """,
    "MambaConfig": """
        enable-mamba-cache-stochastic-rounding mamba-backend mamba-cache-philox-rounds
        mamba-ssu-algorithm
    """,
    "StructuredOutputsConfig": """
        reasoning-parser reasoning-parser-plugin
    """,
    "ParallelConfig": """
        all2all-backend cp-kv-cache-interleave-size cpu-distributed-timeout-seconds
        data-parallel-address data-parallel-backend data-parallel-external-lb
        data-parallel-hybrid-lb data-parallel-multi-port-external-lb data-parallel-rank
        data-parallel-rpc-port data-parallel-size data-parallel-size-local
        data-parallel-start-rank dbo-decode-token-threshold dbo-prefill-token-threshold
        dcp-comm-backend dcp-kv-cache-interleave-size dcp-q-replicate
        decode-context-parallel-size device-ids disable-custom-all-reduce
        disable-nccl-for-dp-synchronization distributed-executor-backend
        distributed-timeout-seconds dp-sync-interval elastic-ep-max-dp-size
        enable-batch-sharded-sampling enable-dbo enable-elastic-ep enable-ep-weight-filter
        enable-eplb enable-expert-parallel enable-fault-tolerance enable-hc-sp
        enable-shm-tensor-arena eplb-config expert-placement-strategy fault-tolerance-config
        master-addr master-port max-parallel-loading-workers nnodes node-rank numa-bind
        numa-bind-cpus numa-bind-nodes pipeline-parallel-size prefill-context-parallel-size
        ray-workers-use-nsight tensor-parallel-size ubatch-size worker-cls
        worker-extension-cls
    """,
    "CacheConfig": """
        block-size enable-mamba-shared-prefix-checkpoint enable-prefix-caching
        gpu-memory-utilization kv-cache-dtype kv-cache-dtype-skip-layers
        kv-cache-memory-bytes kv-offloading-backend kv-offloading-size
        kv-sharing-fast-prefill mamba-block-size mamba-cache-dtype mamba-cache-mode
        mamba-ssm-cache-dtype num-gpu-blocks-override prefix-cache-retention-interval
        prefix-caching-hash-algo prefix-match-unit replayssm-buffer-len swa-bounded-replay
        use-replayssm
    """,
    "OffloadConfig": """
        cpu-offload-gb cpu-offload-params offload-backend offload-group-size
        offload-num-in-group offload-params offload-prefetch-step
    """,
    "MultiModalConfig": """
        enable-mm-embeds interleave-mm-strings language-model-only limit-mm-per-prompt
        media-io-kwargs mm-device-do-normalize mm-encoder-attn-backend mm-encoder-attn-dtype
        mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
        mm-encoder-fp8-scale-save-path mm-encoder-only mm-encoder-tp-mode
        mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb
        mm-processor-cache-type mm-processor-device mm-processor-kwargs
        mm-shm-cache-max-object-size-mb mm-tensor-ipc skip-mm-profiling video-pruning-method
        video-pruning-rate
    """,
    "LoRAConfig": """
        default-mm-loras enable-lora enable-mixed-moe-lora-format enable-moe-shared-loras
        enable-tower-connector-lora fully-sharded-loras lora-dtype lora-target-modules
        max-cpu-loras max-lora-cls-labels max-lora-rank max-loras specialize-active-lora
    """,
    "LoggingConfig": """
        log-config-file log-level logging-config
    """,
    "ObservabilityConfig": """
        collect-detailed-traces cudagraph-metrics custom-histogram-buckets
        enable-layerwise-nvtx-tracing enable-logging-iteration-details enable-mfu-metrics
        jit-monitor-mode jit-monitor-verbose kv-cache-metrics kv-cache-metrics-sample
        otlp-traces-endpoint per-request-spec-decode-metrics show-hidden-metrics-for-version
    """,
    "SchedulerConfig": """
        async-scheduling disable-chunked-mm-input disable-hybrid-kv-cache-manager
        enable-chunked-prefill long-prefill-token-threshold
        long-prefill-token-threshold-adaptive max-num-active-seqs max-num-batched-tokens
        max-num-queued-reqs max-num-queued-tokens max-num-scheduled-tokens max-num-seqs
        prefill-schedule-interval scheduler-cls scheduler-reserve-full-isl scheduling-policy
        stream-interval watermark
    """,
    "CompilationConfig": """
        cudagraph-capture-sizes max-cudagraph-capture-size
    """,
    "KernelConfig": """
        enable-flashinfer-autotune ir-op-priority linear-backend moe-backend
        sparse-indexer-topk-backend
    """,
    "VllmConfig": """
        additional-config attention-config aux-output-config compilation-config
        diffusion-config ec-manager-config ec-transfer-config engram-config kernel-config
        kv-events-config kv-transfer-config optimization-level performance-mode
        profiler-config reasoning-config spec-method spec-model spec-tokens
        speculative-config structured-outputs-config watermark-config weight-transfer-config
    """,
}

DEFAULTS = {
    "host": None,
    "port": 8000,
    "uds": None,
    "api-key": None,
    "root-path": None,
    "chat-template": None,
    "chat-template-content-format": "auto",
    "response-role": "assistant",
    "enable-auto-tool-choice": False,
    "tool-call-parser": None,
    "lora-modules": None,
    "enable-request-id-headers": False,
    "enable-force-include-usage": False,
    "enable-prompt-tokens-details": False,
    "middleware": [],
    "ssl-keyfile": None,
    "ssl-certfile": None,
    "uvicorn-log-level": "info",
    "disable-uvicorn-access-log": False,
    "api-server-count": None,
    "config": None,
    "headless": False,
    "disable-log-stats": False,
    "enable-log-requests": False,
    "shutdown-timeout": 0,
    "model": "Qwen/Qwen3-0.6B",
    "tokenizer": None,
    "tokenizer-mode": "auto",
    "dtype": "auto",
    "max-model-len": None,
    "quantization": None,
    "revision": None,
    "trust-remote-code": False,
    "seed": 0,
    "hf-overrides": {},
    "generation-config": "auto",
    "override-generation-config": {},
    "enforce-eager": False,
    "max-logprobs": 20,
    "logprobs-mode": "raw_logprobs",
    "runner": "auto",
    "served-model-name": None,
    "enable-sleep-mode": False,
    "load-format": "auto",
    "download-dir": None,
    "reasoning-parser": "",
    "attention-backend": None,
    "tensor-parallel-size": 1,
    "pipeline-parallel-size": 1,
    "data-parallel-size": 1,
    "data-parallel-rank": None,
    "data-parallel-address": None,
    "enable-expert-parallel": False,
    "distributed-executor-backend": None,
    "nnodes": 1,
    "node-rank": 0,
    "master-addr": "127.0.0.1",
    "master-port": 29501,
    "block-size": None,
    "gpu-memory-utilization": 0.92,
    "kv-cache-memory-bytes": None,
    "kv-cache-dtype": "auto",
    "enable-prefix-caching": None,
    "prefix-caching-hash-algo": "sha256",
    "num-gpu-blocks-override": None,
    "cpu-offload-gb": 0,
    "limit-mm-per-prompt": {},
    "enable-lora": None,
    "max-loras": 1,
    "max-lora-rank": 16,
    "otlp-traces-endpoint": None,
    "max-num-seqs": None,
    "max-num-batched-tokens": None,
    "enable-chunked-prefill": None,
    "scheduling-policy": "fcfs",
    "async-scheduling": None,
    "stream-interval": 1,
    "max-num-queued-reqs": None,
    "cudagraph-capture-sizes": None,
    "speculative-config": None,
    "kv-transfer-config": None,
    "kv-events-config": None,
    "additional-config": {},
    "optimization-level": 2,
    "performance-mode": "balanced",
}
"""As ``--help=all`` prints them."""

SHORT_FORMS = {
    "api-server-count": "-asc",
    "quantization": "-q",
    "tensor-parallel-size": "-tp",
    "pipeline-parallel-size": "-pp",
    "data-parallel-size": "-dp",
    "data-parallel-rank": "-dpn",
    "data-parallel-address": "-dpa",
    "enable-expert-parallel": "-ep",
    "nnodes": "-n",
    "node-rank": "-r",
    "speculative-config": "-sc",
    "compilation-config": "-cc",
}
