"""Limits and policy of the scheduler."""

from dataclasses import dataclass

from vllm.config.checks import at_least, one_of, within
from vllm.errors import ConfigError

POLICIES = ("fcfs", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold, who may wait, and in which order.

    Raises:
        ConfigError: a field has a value that cannot work, or two contradict each other.
    """

    max_num_batched_tokens: int
    """Tokens computed in one step, at most."""
    max_num_seqs: int
    """Requests in one step, at most."""
    max_model_len: int
    """Tokens of one request, prompt and output together, at most."""
    max_num_queued_reqs: int | None = None
    """Requests waiting, at most; one more is refused with 503. None: no limit."""
    enable_chunked_prefill: bool = True
    """A prompt may be computed over several steps; else it needs to fit in one."""
    policy: str = "fcfs"
    """"fcfs" or "priority" (a smaller number first, then the earlier arrival)."""
    long_prefill_token_threshold: int = 0
    """Largest chunk of one prompt in a step; 0 for no limit but the budget."""
    stream_interval: int = 1
    """Tokens between two outputs of a streamed request."""
    async_scheduling: bool = False
    """Schedule the next step while the last one runs."""
    scheduler_cls: str | None = None
    """Dotted path of a scheduler class that replaces the engine's own."""
    disable_hybrid_kv_cache_manager: bool = False
    """Give layers of every kind the blocks that full attention would need."""
    watermark: float = 0.0
    """Fraction of blocks kept free when a request is admitted."""

    def __post_init__(self) -> None:
        at_least(
            self, 1, "max_num_batched_tokens", "max_num_seqs", "max_model_len", "stream_interval"
        )
        at_least(self, 0, "max_num_queued_reqs", "long_prefill_token_threshold")
        one_of(self, POLICIES, "policy")
        within(self, 0.0, 1.0, "watermark")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} must be at least "
                f"max_model_len {self.max_model_len} without chunked prefill",
                parameter="max_num_batched_tokens",
                value=self.max_num_batched_tokens,
            )
