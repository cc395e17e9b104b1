"""Limits and policy of the scheduler."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_num_batched_tokens: int
    """Tokens computed in one step, at most."""
    max_num_seqs: int
    """Requests in one step, at most."""
    max_model_len: int
    max_num_queued_reqs: int | None = None
    """Requests waiting, at most; one more is refused with 503. None: no limit."""
    enable_chunked_prefill: bool = True
    policy: str = "fcfs"
    """"fcfs" or "priority" (a smaller number first, then the earlier arrival)."""
    long_prefill_token_threshold: int = 0
    """Largest chunk of one prompt in a step; 0 for no limit but the budget."""
    stream_interval: int = 1
    async_scheduling: bool = False
    scheduler_cls: str | None = None
    disable_hybrid_kv_cache_manager: bool = False
    watermark: float = 0.0
    """Fraction of blocks kept free when a request is admitted."""
