"""The engine's Prometheus metrics: vLLM's names, types, labels and buckets.

Owns the metric objects of one engine and how steps change them. Knows no HTTP; a server exports
``get_prometheus_registry()``.
"""

import collections
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.v1.engine import FINISH_REASON_STRINGS, EngineFacts, SchedulerStats
from vllm.v1.metrics.stats import IterationStats

__all__ = [
    "PrometheusStatLogger",
    "get_process_registry",
    "get_prometheus_registry",
    "one_two_five_buckets",
    "unregister_vllm_metrics",
]

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_TIME = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_TIME = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SMALL_COUNTS = (1, 2, 5, 10, 20)
_PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50)
_LABELS = ("model_name", "engine")
# All processes speak of one engine, and each step's gauges reach one of them.
_GAUGE_MODE: Any = "mostrecent"
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
_WAITING_REASONS = ("capacity", "deferred")
_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_KV_TRANSFER_COUNTERS = {
    "transfers": "Requests whose KV was fetched from another engine.",
    "transfer_bytes": "Bytes of KV fetched from other engines.",
    "transfer_descriptors": "Runs of bytes that these were fetched in.",
    "transfer_seconds": "Seconds from the order to fetch until the last byte was confirmed.",
    "transfer_post_seconds": "Of these, seconds until the copies were under way.",
    "transfer_check_seconds": "Of these, seconds for confirming that the bytes were right.",
    "transfers_by_descriptors": "Ranks' shares whose runs went straight to their place.",
    "transfers_by_staging": "Ranks' shares that were gathered, moved as large runs and scattered.",
    "transfers_by_mapped": "Ranks' shares that a kernel read out of the peer's memory.",
    "failed_transfers": "Loads that failed.",
    "failed_sends": "Requests of other engines for KV that came to nothing.",
    "late_reads": "Loads whose blocks had been given back before they were read.",
    "quarantined_blocks": "Blocks kept back because something may still be written to them.",
    "expired_leases": "Prefills that nobody fetched in time.",
    "handshakes": "Engines that KV can be fetched from.",
    "failed_handshakes": "Engines that could not be connected with.",
    "failed_notifications": "Messages to other engines that could not be sent.",
    "refused_notifications": "Messages of other engines that mean nothing here.",
    "offload_load_bytes": "Bytes of KV brought back from host memory.",
    "offload_store_bytes": "Bytes of KV copied to host memory.",
    "offload_load_blocks": "Blocks brought back from host memory.",
    "offload_store_blocks": "Blocks copied to host memory.",
    "offload_file_load_bytes": "Bytes of KV brought back from files to host memory.",
    "offload_file_store_bytes": "Bytes of KV that went from host memory to files.",
    "offload_file_failed_loads": "Files of KV that were missing or damaged.",
    "offload_file_failed_stores": "Files of KV that could not be written.",
    "offload_load_seconds": "Seconds spent on bringing blocks back.",
    "offload_store_seconds": "Seconds spent on copying blocks out.",
}
# What cache_config_info says of settings that exist in vLLM only: that they are off.
_CACHE_INFO_OFF = {
    "enable_mamba_shared_prefix_checkpoint": "False",
    "is_attention_free": "False",
    "mamba_page_size_padded": "None",
    "num_cpu_blocks": "None",
    "prefix_cache_retention_interval": "None",
    "prefix_match_unit": "None",
    "replayssm_buffer_len": "None",
    "skip_page_size_padded": "None",
    "swa_bounded_replay": "False",
    "use_kda_recoverssm": "False",
    "use_replayssm": "False",
}


class _RepeatedHistogram(Histogram):
    """Takes in a value that comes up many times, as a step's inter-token latencies do."""

    def observe_times(self, amount: float, count: int) -> None:
        """As ``observe(amount)``, ``count`` times."""
        self._sum.inc(amount * count)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(count)


def get_process_registry() -> CollectorRegistry:
    """The registry that this process's metrics are in, beside Python's own."""
    return REGISTRY


def get_prometheus_registry() -> CollectorRegistry:
    """What is to be shown: the process's metrics, or, where PROMETHEUS_MULTIPROC_DIR is set, those
    of all processes that share the directory, put together.
    """
    if not envs.PROMETHEUS_MULTIPROC_DIR:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return registry


def unregister_vllm_metrics() -> None:
    """Forget the metrics of an earlier engine of this process."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("vllm:"):
            REGISTRY.unregister(collector)


def one_two_five_buckets(maximum: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to ``maximum``."""
    buckets = []
    scale = 1
    while scale <= maximum:
        buckets += [scale * digit for digit in (1, 2, 5) if scale * digit <= maximum]
        scale *= 10
    return buckets


def cache_config_labels(vllm_config: VllmConfig, facts: EngineFacts) -> dict[str, str]:
    """Labels of ``vllm:cache_config_info``."""
    config = vllm_config.cache_config
    values: dict[str, Any] = {
        "_block_size_resolved": True,
        "block_size": facts.block_size,
        "cache_dtype": config.cache_dtype,
        "cache_hit_alignment_tokens": facts.block_size,
        "effective_attention_block_size": facts.block_size,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "hash_block_size": facts.block_size,
        "kv_cache_dtype_skip_layers": list(config.kv_cache_dtype_skip_layers),
        "kv_cache_layout": facts.kv_cache_layout,
        "kv_cache_max_concurrency": f"{facts.kv_cache_max_concurrency:.2f}",
        "kv_cache_memory_bytes": facts.kv_cache_memory_bytes,
        "kv_cache_size_tokens": facts.kv_cache_size_tokens,
        "kv_offloading_backend": config.kv_offloading_backend,
        "kv_offloading_size": config.kv_offloading_size,
        "kv_sharing_fast_prefill": config.kv_sharing_fast_prefill,
        "mamba_block_size": config.mamba_block_size,
        "mamba_cache_dtype": config.mamba_cache_dtype,
        "mamba_cache_mode": config.mamba_cache_mode,
        "mamba_ssm_cache_dtype": config.mamba_ssm_cache_dtype,
        "num_gpu_blocks": facts.num_gpu_blocks,
        "num_gpu_blocks_override": config.num_gpu_blocks_override,
        "prefix_caching_hash_algo": config.prefix_caching_hash_algo,
        "sliding_window": config.sliding_window,
        "user_specified_block_size": getattr(config, "user_specified_block_size", False),
        **_CACHE_INFO_OFF,
    }
    return {name: str(values[name]) for name in sorted(values)}


class PrometheusStatLogger:
    """Metrics of one engine. A second one in the same process takes the first one's place."""

    def __init__(self, vllm_config: VllmConfig, facts: EngineFacts, engine_index: int = 0) -> None:
        unregister_vllm_metrics()
        model_config = vllm_config.model_config
        names = model_config.served_model_name
        self._labels = (names[0] if names else model_config.model, str(engine_index))
        self._make_gauges()
        self._make_counters(vllm_config)
        self._make_histograms(model_config.max_model_len)
        info = {**cache_config_labels(vllm_config, facts), "engine": str(engine_index)}
        Gauge(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            sorted(info),
            multiprocess_mode=_GAUGE_MODE,
        ).labels(**info).set(1)

    def _gauge(self, name: str, help_text: str) -> Any:
        gauge = Gauge(name, help_text, _LABELS, multiprocess_mode=_GAUGE_MODE)
        return gauge.labels(*self._labels)

    def _counter(self, name: str, help_text: str) -> Any:
        return Counter(name, help_text, _LABELS).labels(*self._labels)

    def _histogram(self, name: str, help_text: str, buckets: Iterable[float]) -> Any:
        histogram = _RepeatedHistogram(name, help_text, _LABELS, buckets=tuple(buckets))
        return histogram.labels(*self._labels)

    def _by(
        self, kind: type, name: str, help_text: str, label: str, values: Iterable[str]
    ) -> dict[str, Any]:
        """One child for each value of a further label."""
        options = {"multiprocess_mode": _GAUGE_MODE} if kind is Gauge else {}
        metric = kind(name, help_text, (*_LABELS, label), **options)
        return {value: metric.labels(*self._labels, value) for value in values}

    def _make_gauges(self) -> None:
        self._running = self._gauge(
            "vllm:num_requests_running", "Number of requests in model execution batches."
        )
        self._waiting = self._gauge(
            "vllm:num_requests_waiting", "Number of requests waiting to be processed."
        )
        self._waiting_by_reason = self._by(
            Gauge,
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by what they wait for.",
            "reason",
            _WAITING_REASONS,
        )
        self._cache_usage = self._gauge(
            "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."
        )
        self._sleep_state = self._by(
            Gauge,
            "vllm:engine_sleep_state",
            "Engine sleep state; awake = 0 means that the engine sleeps.",
            "sleep_state",
            _SLEEP_STATES,
        )
        self._sleep_state["awake"].set(1)

    def _make_counters(self, vllm_config: VllmConfig) -> None:
        counter = self._counter
        transfer = vllm_config.kv_transfer_config
        self._kv_transfer = {
            name: counter(f"vllm:kv_{name}", text)
            for name, text in (_KV_TRANSFER_COUNTERS.items() if transfer is not None else ())
        }
        self._prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self._external_queries = counter(
            "vllm:external_prefix_cache_queries",
            "Prompt tokens looked up in a KV connector's cache.",
        )
        self._external_hits = counter(
            "vllm:external_prefix_cache_hits", "Prompt tokens found in a KV connector's cache."
        )
        counter("vllm:mm_cache_queries", "Items looked up in the multi-modal cache.")
        counter("vllm:mm_cache_hits", "Items found in the multi-modal cache.")
        counter("vllm:estimated_flops_per_gpu", "Estimated floating-point operations per GPU.")
        counter("vllm:estimated_read_bytes_per_gpu", "Estimated bytes read from memory per GPU.")
        counter("vllm:estimated_write_bytes_per_gpu", "Estimated bytes written per GPU.")
        self._preemptions = counter(
            "vllm:num_preemptions", "Cumulative number of preemptions by the engine."
        )
        self._prompt_tokens = counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
        self._prompt_tokens_cached = counter(
            "vllm:prompt_tokens_cached", "Prompt tokens whose KV was in a cache."
        )
        self._prompt_by_source = self._by(
            Counter,
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            "source",
            _SOURCES,
        )
        self._cached_by_source = self._by(
            Counter,
            "vllm:prompt_tokens_cached_by_source",
            "Cached prompt tokens by where their KV came from.",
            "source",
            _SOURCES[1:],
        )
        self._generation_tokens = counter(
            "vllm:generation_tokens", "Number of generation tokens processed."
        )
        self._success = self._by(
            Counter,
            "vllm:request_success",
            "Count of finished requests.",
            "finished_reason",
            FINISH_REASON_STRINGS,
        )
        self._rejections = Counter(
            "vllm:admission_rejections", "Requests refused on arrival.", ("model_name", "reason")
        )

    def _make_histograms(self, max_model_len: int) -> None:
        lengths = one_two_five_buckets(max_model_len)
        histogram = self._histogram
        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "Time to first token in seconds.", _TTFT
        )
        self._itl = histogram(
            "vllm:inter_token_latency_seconds", "Inter-token latency in seconds.", _TOKEN_TIME
        )
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Time per output token of a request, in seconds.",
            _TOKEN_TIME,
        )
        self._iteration_tokens = histogram(
            "vllm:iteration_tokens_total", "Number of tokens per engine step.", _ITERATION_TOKENS
        )
        self._e2e = histogram(
            "vllm:e2e_request_latency_seconds", "End-to-end request latency.", _REQUEST_TIME
        )
        self._queue_time = histogram(
            "vllm:request_queue_time_seconds", "Time spent in WAITING phase.", _REQUEST_TIME
        )
        self._inference_time = histogram(
            "vllm:request_inference_time_seconds", "Time spent in RUNNING phase.", _REQUEST_TIME
        )
        self._prefill_time = histogram(
            "vllm:request_prefill_time_seconds", "Time spent in PREFILL phase.", _REQUEST_TIME
        )
        self._decode_time = histogram(
            "vllm:request_decode_time_seconds", "Time spent in DECODE phase.", _REQUEST_TIME
        )
        self._request_prompt = histogram(
            "vllm:request_prompt_tokens", "Number of prefill tokens processed.", lengths
        )
        self._request_generation = histogram(
            "vllm:request_generation_tokens", "Number of generation tokens processed.", lengths
        )
        self._request_computed = histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Prompt tokens of a request whose KV was computed, not found.",
            lengths,
        )
        self._max_generation = histogram(
            "vllm:request_max_num_generation_tokens",
            "Most tokens of any of a request's sequences.",
            lengths,
        )
        self._max_tokens = histogram(
            "vllm:request_params_max_tokens", "The max_tokens request parameter.", lengths
        )
        self._n = histogram("vllm:request_params_n", "The n request parameter.", _SMALL_COUNTS)
        self._num_preemptions = histogram(
            "vllm:request_num_preemptions", "How often a request was preempted.", _PREEMPTIONS
        )

    def record_sleep_state(self, level: int | None) -> None:
        """The engine sleeps at ``level``; None: it is awake."""
        self._sleep_state["awake"].set(level is None)
        self._sleep_state["weights_offloaded"].set(level == 1)
        self._sleep_state["discard_all"].set(level == 2)

    def record(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        """Take in one step."""
        if scheduler is not None:
            self._record_scheduler(scheduler)
        if iteration is not None:
            self._record_iteration(iteration)

    def _record_scheduler(self, stats: SchedulerStats) -> None:
        self._running.set(stats.num_running_reqs)
        self._waiting.set(stats.num_waiting_reqs)
        self._cache_usage.set(stats.kv_cache_usage)
        for reason, gauge in self._waiting_by_reason.items():
            gauge.set(stats.num_waiting_by_reason.get(reason, 0))
        if stats.prefix_cache_queries:
            self._prefix_queries.inc(stats.prefix_cache_queries)
            self._prefix_hits.inc(stats.prefix_cache_hits)
        if stats.external_prefix_cache_queries:
            self._external_queries.inc(stats.external_prefix_cache_queries)
            self._external_hits.inc(stats.external_prefix_cache_hits)
        for name, value in stats.kv_connector.items():
            counter = self._kv_transfer.get(name)
            if counter is not None:
                counter.inc(value)
        if stats.num_preemptions:
            self._preemptions.inc(stats.num_preemptions)
        if stats.num_scheduled_tokens:
            self._iteration_tokens.observe(stats.num_scheduled_tokens)

    def _record_iteration(self, stats: IterationStats) -> None:
        if stats.num_generation_tokens:
            self._generation_tokens.inc(stats.num_generation_tokens)
        if stats.num_prompt_tokens:
            self._record_prompts(stats)
        for value in stats.time_to_first_tokens:
            self._ttft.observe(value)
        # Most requests of a step had their last token in the step before.
        for value, times in collections.Counter(stats.inter_token_latencies).items():
            self._itl.observe_times(value, times)
        for count in stats.max_num_generation_tokens:
            self._max_generation.observe(count)
        for count in stats.n_params:
            self._n.observe(count)
        for reason, count in stats.rejections.items():
            self._rejections.labels(self._labels[0], reason).inc(count)
        for finished in stats.finished_requests:
            self._record_finished(finished)

    def _record_prompts(self, stats: IterationStats) -> None:
        sources = stats.prompt_tokens
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._prompt_by_source["local_compute"].inc(sources.local_compute)
        cached = {
            "local_cache_hit": sources.local_cache_hit,
            "external_kv_transfer": sources.external_kv_transfer,
        }
        for source, count in cached.items():
            if count:
                self._prompt_by_source[source].inc(count)
                self._cached_by_source[source].inc(count)
                self._prompt_tokens_cached.inc(count)

    def _record_finished(self, finished: Any) -> None:
        self._success[str(finished.finish_reason)].inc()
        self._e2e.observe(finished.e2e_latency)
        self._queue_time.observe(finished.queued_time)
        self._prefill_time.observe(finished.prefill_time)
        self._inference_time.observe(finished.inference_time)
        self._decode_time.observe(finished.decode_time)
        self._request_prompt.observe(finished.num_prompt_tokens)
        self._request_computed.observe(finished.num_prompt_tokens - finished.num_cached_tokens)
        self._request_generation.observe(finished.num_generation_tokens)
        self._num_preemptions.observe(finished.num_preemptions)
        if finished.num_generation_tokens > 1:
            self._tpot.observe(finished.mean_time_per_output_token)
        if finished.max_tokens_param is not None:
            self._max_tokens.observe(finished.max_tokens_param)
