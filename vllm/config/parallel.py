"""How many processes share the model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    distributed_executor_backend: str = "uni"
    """"uni" (in the engine's process), "mp" or "ray"."""
    worker_cls: str = "auto"
    """Dotted path of the worker class; "auto" lets the platform choose."""
    rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29501

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size
