"""What is counted per request and per step in the front end. Plain numbers; no Prometheus."""

import time
from dataclasses import dataclass, field

from vllm.outputs import RequestMetrics
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason

__all__ = ["FinishedRequestStats", "IterationStats", "PromptTokenSources"]


@dataclass(slots=True)
class FinishedRequestStats:
    """One sequence that has ended; times in seconds, 0 where a phase was never reached."""

    finish_reason: FinishReason
    e2e_latency: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    max_tokens_param: int | None
    queued_time: float
    prefill_time: float
    inference_time: float
    decode_time: float
    mean_time_per_output_token: float
    num_preemptions: int


@dataclass(slots=True)
class PromptTokenSources:
    """Prompt tokens whose KV is in place, by where it came from."""

    local_compute: int = 0
    local_cache_hit: int = 0
    external_kv_transfer: int = 0


@dataclass(slots=True)
class IterationStats:
    """What one engine step's outputs add up to. ``now`` is wall-clock time, in seconds."""

    now: float = field(default_factory=time.time)
    num_generation_tokens: int = 0
    num_prompt_tokens: int = 0
    prompt_tokens: PromptTokenSources = field(default_factory=PromptTokenSources)
    time_to_first_tokens: list[float] = field(default_factory=list)
    inter_token_latencies: list[float] = field(default_factory=list)
    finished_requests: list[FinishedRequestStats] = field(default_factory=list)
    max_num_generation_tokens: list[int] = field(default_factory=list)
    n_params: list[int] = field(default_factory=list)
    rejections: dict[str, int] = field(default_factory=dict)
    """Requests refused on arrival, by reason."""

    def update_from_output(
        self,
        output: EngineCoreOutput,
        engine_timestamp: float,
        metrics: RequestMetrics,
        num_prompt_tokens: int,
    ) -> None:
        """Take in one request's output; ``engine_timestamp`` is the engine's monotonic clock."""
        for event in output.events or ():
            if event.type is EngineCoreEventType.QUEUED:
                metrics.queued_ts = event.timestamp
            elif event.type is EngineCoreEventType.SCHEDULED and not metrics.scheduled_ts:
                metrics.scheduled_ts = event.timestamp
        metrics.num_preemptions = max(metrics.num_preemptions, output.num_preemptions)
        num_new = len(output.new_token_ids)
        if not num_new:
            return
        self.num_generation_tokens += num_new
        if metrics.num_generation_tokens == 0:
            metrics.first_token_ts = engine_timestamp
            metrics.first_token_latency = self.now - metrics.arrival_time
            self.time_to_first_tokens.append(metrics.first_token_latency)
            self.num_prompt_tokens += num_prompt_tokens
            cached = min(output.num_cached_tokens, num_prompt_tokens)
            external = min(output.num_external_tokens, cached)
            self.prompt_tokens.external_kv_transfer += external
            self.prompt_tokens.local_cache_hit += cached - external
            self.prompt_tokens.local_compute += num_prompt_tokens - cached
        else:
            self.inter_token_latencies.append(engine_timestamp - metrics.last_token_ts)
        metrics.num_generation_tokens += num_new
        metrics.last_token_ts = engine_timestamp

    def update_from_finished(
        self,
        finish_reason: FinishReason,
        metrics: RequestMetrics,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        max_tokens_param: int | None,
    ) -> None:
        decode_time = max(metrics.last_token_ts - metrics.first_token_ts, 0.0)
        started, has_token = bool(metrics.scheduled_ts), bool(metrics.first_token_ts)
        num_gaps = metrics.num_generation_tokens - 1
        self.finished_requests.append(
            FinishedRequestStats(
                finish_reason=finish_reason,
                e2e_latency=self.now - metrics.arrival_time,
                num_prompt_tokens=num_prompt_tokens,
                num_cached_tokens=num_cached_tokens,
                num_generation_tokens=metrics.num_generation_tokens,
                max_tokens_param=max_tokens_param,
                queued_time=metrics.scheduled_ts - metrics.queued_ts if started else 0.0,
                prefill_time=metrics.first_token_ts - metrics.scheduled_ts if has_token else 0.0,
                inference_time=metrics.last_token_ts - metrics.scheduled_ts if has_token else 0.0,
                decode_time=decode_time,
                mean_time_per_output_token=decode_time / num_gaps if num_gaps > 0 else 0.0,
                num_preemptions=metrics.num_preemptions,
            )
        )
