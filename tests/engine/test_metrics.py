"""Metric names, labels and buckets are vLLM's, and they count what happened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.v1.engine import EngineFacts, FinishReason, SchedulerStats
from vllm.v1.metrics.loggers import LoggingStatLogger
from vllm.v1.metrics.prometheus import (
    PrometheusStatLogger,
    get_prometheus_registry,
    one_two_five_buckets,
)
from vllm.v1.metrics.reader import Counter, Gauge, Histogram, get_metrics_snapshot
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, PromptTokenSources

NAMES = """
admission_rejections_total counter
cache_config_info gauge
e2e_request_latency_seconds histogram
engine_sleep_state gauge
estimated_flops_per_gpu_total counter
estimated_read_bytes_per_gpu_total counter
estimated_write_bytes_per_gpu_total counter
external_prefix_cache_hits_total counter
external_prefix_cache_queries_total counter
generation_tokens_total counter
inter_token_latency_seconds histogram
iteration_tokens_total histogram
kv_cache_usage_perc gauge
mm_cache_hits_total counter
mm_cache_queries_total counter
num_preemptions_total counter
num_requests_running gauge
num_requests_waiting gauge
num_requests_waiting_by_reason gauge
prefix_cache_hits_total counter
prefix_cache_queries_total counter
prompt_tokens_by_source_total counter
prompt_tokens_cached_by_source_total counter
prompt_tokens_cached_total counter
prompt_tokens_total counter
request_decode_time_seconds histogram
request_generation_tokens histogram
request_inference_time_seconds histogram
request_max_num_generation_tokens histogram
request_num_preemptions histogram
request_params_max_tokens histogram
request_params_n histogram
request_prefill_kv_computed_tokens histogram
request_prefill_time_seconds histogram
request_prompt_tokens histogram
request_queue_time_seconds histogram
request_success_total counter
request_time_per_output_token_seconds histogram
time_to_first_token_seconds histogram
"""
CACHE_LABELS = """
_block_size_resolved block_size cache_dtype cache_hit_alignment_tokens
effective_attention_block_size enable_mamba_shared_prefix_checkpoint enable_prefix_caching engine
gpu_memory_utilization hash_block_size is_attention_free kv_cache_dtype_skip_layers
kv_cache_layout kv_cache_max_concurrency kv_cache_memory_bytes kv_cache_size_tokens
kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill mamba_block_size
mamba_cache_dtype mamba_cache_mode mamba_page_size_padded mamba_ssm_cache_dtype num_cpu_blocks
num_gpu_blocks num_gpu_blocks_override prefix_cache_retention_interval prefix_caching_hash_algo
prefix_match_unit replayssm_buffer_len skip_page_size_padded sliding_window swa_bounded_replay
use_kda_recoverssm use_replayssm user_specified_block_size
"""
FACTS = EngineFacts(
    num_gpu_blocks=100,
    block_size=16,
    kv_cache_layout="LBHNC",
    kv_cache_memory_bytes=1 << 20,
    kv_cache_size_tokens=1600,
    kv_cache_max_concurrency=6.25,
)


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> VllmConfig:
    return EngineArgs(model=str(tiny_model), served_model_name=["tiny"]).create_engine_config()


@pytest.fixture
def prometheus(config: VllmConfig) -> PrometheusStatLogger:
    return PrometheusStatLogger(config, FACTS)


def test_names_and_types_are_vllms(prometheus: PrometheusStatLogger) -> None:
    prometheus.record(None, IterationStats(rejections={"max_num_queued_reqs": 1}))
    registry = get_prometheus_registry()
    assert isinstance(registry, CollectorRegistry)
    text = generate_latest(registry).decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE vllm:"))
    created = {name for name in types if name.endswith("_created")}
    expected = dict(line.split() for line in NAMES.split("\n") if line)
    assert {n: t for n, t in types.items() if n not in created} == {
        f"vllm:{name}": kind for name, kind in expected.items()
    }
    # Counters and histograms tell when they were made.
    assert len(created) == sum(kind != "gauge" for kind in expected.values())


def test_labels(prometheus: PrometheusStatLogger) -> None:
    families = text_string_to_metric_families(generate_latest().decode())
    labels: dict[str, set[str]] = {}
    values: dict[str, dict[str, str]] = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("vllm:") and not sample.name.endswith("_created"):
                labels.setdefault(family.name, set()).update(sample.labels)
                values[family.name] = sample.labels
    cache = labels.pop("vllm:cache_config_info")
    assert cache == set(CACHE_LABELS.split())
    assert values["vllm:cache_config_info"]["num_gpu_blocks"] == "100"
    extra = {
        "vllm:num_requests_waiting_by_reason": {"reason"},
        "vllm:engine_sleep_state": {"sleep_state"},
        "vllm:prompt_tokens_by_source": {"source"},
        "vllm:prompt_tokens_cached_by_source": {"source"},
        "vllm:request_success": {"finished_reason"},
    }
    for name, own in labels.items():
        assert own - {"le"} == {"engine", "model_name"} | extra.get(name, set()), name
    assert values["vllm:num_requests_running"]["model_name"] == "tiny"


def snapshot() -> dict[str, Any]:
    return {metric.name: metric for metric in get_metrics_snapshot()}


def test_a_step_is_counted(prometheus: PrometheusStatLogger) -> None:
    finished = FinishedRequestStats(
        finish_reason=FinishReason.STOP,
        e2e_latency=1.25,
        num_prompt_tokens=40,
        num_cached_tokens=16,
        num_generation_tokens=3,
        max_tokens_param=30,
        queued_time=0.1,
        prefill_time=0.2,
        inference_time=0.9,
        decode_time=0.7,
        mean_time_per_output_token=0.35,
        num_preemptions=1,
    )
    prometheus.record(
        SchedulerStats(
            num_running_reqs=3,
            num_waiting_reqs=2,
            kv_cache_usage=0.5,
            prefix_cache_queries=40,
            prefix_cache_hits=16,
            num_preemptions=1,
            num_scheduled_tokens=27,
            num_waiting_by_reason={"capacity": 2},
        ),
        IterationStats(
            num_generation_tokens=5,
            num_prompt_tokens=40,
            prompt_tokens=PromptTokenSources(local_compute=24, local_cache_hit=16),
            time_to_first_tokens=[0.03],
            inter_token_latencies=[0.02, 0.3],
            finished_requests=[finished],
            max_num_generation_tokens=[3],
            n_params=[1],
        ),
    )
    metrics = snapshot()
    assert metrics["vllm:num_requests_running"] == Gauge(
        "vllm:num_requests_running", {"engine": "0", "model_name": "tiny"}, 3.0
    )
    assert metrics["vllm:kv_cache_usage_perc"].value == 0.5
    counters = {
        "generation_tokens": 5, "prompt_tokens": 40, "prompt_tokens_cached": 16,
        "prefix_cache_queries": 40, "prefix_cache_hits": 16, "num_preemptions": 1,
    }  # fmt: skip
    for name, value in counters.items():
        assert isinstance(metrics[f"vllm:{name}"], Counter)
        assert metrics[f"vllm:{name}"].value == value, name
    by_label = {
        (m.name, *sorted(m.labels.values())): m.value
        for m in get_metrics_snapshot()
        if isinstance(m, Counter)
    }
    assert by_label["vllm:request_success", "0", "stop", "tiny"] == 1
    assert by_label["vllm:request_success", "0", "length", "tiny"] == 0
    assert by_label["vllm:prompt_tokens_by_source", "0", "local_compute", "tiny"] == 24
    histograms = {
        "inter_token_latency_seconds": (2, 0.32), "time_to_first_token_seconds": (1, 0.03),
        "iteration_tokens_total": (1, 27), "request_prefill_kv_computed_tokens": (1, 24),
        "e2e_request_latency_seconds": (1, 1.25), "request_params_max_tokens": (1, 30),
        "request_time_per_output_token_seconds": (1, 0.35), "request_num_preemptions": (1, 1),
    }  # fmt: skip
    for name, (count, total) in histograms.items():
        histogram = metrics[f"vllm:{name}"]
        assert isinstance(histogram, Histogram)
        assert (histogram.count, histogram.sum) == (count, pytest.approx(total)), name
        assert histogram.buckets["+Inf"] == count
    itl = metrics["vllm:inter_token_latency_seconds"].buckets
    assert (itl["0.01"], itl["0.025"], itl["0.3"]) == (0, 1, 2)


def test_a_second_engine_starts_from_nothing(
    prometheus: PrometheusStatLogger, config: VllmConfig
) -> None:
    prometheus.record(None, IterationStats(num_generation_tokens=5))
    PrometheusStatLogger(config, FACTS)
    assert snapshot()["vllm:generation_tokens"].value == 0


def test_buckets() -> None:
    assert one_two_five_buckets(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five_buckets(8192)[-3:] == [1000, 2000, 5000]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_the_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr("vllm.v1.metrics.loggers.time.monotonic", lambda: next(clock))
    seen = _Messages()
    monkeypatch.setattr("vllm.v1.metrics.loggers.logger.handlers", [seen])
    stat_logger = LoggingStatLogger()
    stat_logger.log()
    assert seen.messages == []
    stat_logger.record(
        SchedulerStats(2, 1, 0.125, prefix_cache_queries=100, prefix_cache_hits=25),
        IterationStats(
            num_generation_tokens=40, prompt_tokens=PromptTokenSources(local_compute=100)
        ),
    )
    stat_logger.log()
    assert seen.messages == [
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 4.0 "
        "tokens/s, Running: 2 reqs, Waiting: 1 reqs, GPU KV cache usage: 12.5%, "
        "Prefix cache hit rate: 25.0%"
    ]
    stat_logger.record(SchedulerStats(), None)
    # The first idle line shows that it is idle; then silence.
    stat_logger.log()
    stat_logger.log()
    assert len(seen.messages) == 2
