"""How many processes share the model."""

from dataclasses import dataclass

from vllm.config.checks import at_least, within


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the process groups, and where they meet.

    Raises:
        ConfigError: a size is not positive, or the port is none.
    """

    tensor_parallel_size: int = 1
    """Processes that share every layer's heads and columns."""
    pipeline_parallel_size: int = 1
    """Processes that share the layers."""
    data_parallel_size: int = 1
    """Whole engines side by side."""
    decode_context_parallel_size: int = 1
    """Processes that share the tokens of a context while decoding."""
    distributed_executor_backend: str = "uni"
    """"uni" (in the engine's process), "mp" or "ray"."""
    worker_cls: str = "auto"
    """Dotted path of the worker class; "auto" lets the platform choose."""
    rank: int = 0
    """Of this process, among ``world_size``."""
    master_addr: str = "127.0.0.1"
    master_port: int = 29501

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "decode_context_parallel_size",
        )
        within(self, 0, 65535, "master_port")

    @property
    def world_size(self) -> int:
        """Processes of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
