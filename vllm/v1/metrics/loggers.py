"""Where statistics go: the log line of a running engine, and Prometheus."""

import time

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine import EngineFacts, SchedulerStats
from vllm.v1.metrics.prometheus import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats

__all__ = ["LoggingStatLogger", "StatLoggerManager"]

logger = init_logger(__name__)

# Looked-up tokens after which older ones count for half in the hit rate shown.
_HIT_RATE_WINDOW_TOKENS = 100_000


class LoggingStatLogger:
    """vLLM's line: throughput since the last line, and what the scheduler last said."""

    def __init__(self, engine_index: int = 0) -> None:
        self._engine_index = engine_index
        self._scheduler = SchedulerStats()
        self._queries = 0
        self._hits = 0
        # An engine that nobody has asked anything has nothing to say.
        self._was_idle = True
        self._begin_interval(time.monotonic())

    def _begin_interval(self, now: float) -> None:
        self._since = now
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    def record(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        """Take in one step."""
        if iteration is not None:
            self._num_prompt_tokens += iteration.prompt_tokens.local_compute
            self._num_generation_tokens += iteration.num_generation_tokens
        if scheduler is None:
            return
        self._scheduler = scheduler
        self._queries += scheduler.prefix_cache_queries
        self._hits += scheduler.prefix_cache_hits
        if self._queries > _HIT_RATE_WINDOW_TOKENS:
            self._queries //= 2
            self._hits //= 2

    def log(self) -> None:
        """Write the line, unless nothing has happened since the last one said so."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-6)
        prompt_rate = self._num_prompt_tokens / seconds
        generation_rate = self._num_generation_tokens / seconds
        stats = self._scheduler
        is_idle = not (
            prompt_rate or generation_rate or stats.num_running_reqs or stats.num_waiting_reqs
        )
        self._begin_interval(now)
        if is_idle and self._was_idle:
            return
        self._was_idle = is_idle
        hit_rate = self._hits / self._queries if self._queries else 0.0
        logger.info(
            "Engine %03d: Avg prompt throughput: %.1f tokens/s, "
            "Avg generation throughput: %.1f tokens/s, Running: %d reqs, Waiting: %d reqs, "
            "GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            self._engine_index,
            prompt_rate,
            generation_rate,
            stats.num_running_reqs,
            stats.num_waiting_reqs,
            stats.kv_cache_usage * 100,
            hit_rate * 100,
        )


class StatLoggerManager:
    """All loggers of one engine; ``log`` False keeps the metrics but writes no lines."""

    def __init__(self, vllm_config: VllmConfig, facts: EngineFacts, *, log: bool = True) -> None:
        self.prometheus = PrometheusStatLogger(vllm_config, facts)
        self._logging = LoggingStatLogger() if log else None

    def record(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        self.prometheus.record(scheduler, iteration)
        if self._logging is not None:
            self._logging.record(scheduler, iteration)

    def log(self) -> None:
        if self._logging is not None:
            self._logging.log()
