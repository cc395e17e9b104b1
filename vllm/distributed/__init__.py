"""Groups of processes and what moves between them.

The names of ``parallel_state`` and ``communication_op`` are resolved when first used: connectors
live below this package too, and importing them must not import torch.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    name: f"vllm.distributed.{module}"
    for module, names in {
        "parallel_state": (
            "GroupCoordinator",
            "destroy_distributed_environment",
            "destroy_model_parallel",
            "get_pp_group",
            "get_tensor_model_parallel_rank",
            "get_tensor_model_parallel_world_size",
            "get_tp_group",
            "get_world_group",
            "init_distributed_environment",
            "initialize_model_parallel",
            "model_parallel_is_initialized",
        ),
        "communication_op": (
            "tensor_model_parallel_all_gather",
            "tensor_model_parallel_all_reduce",
            "tensor_model_parallel_gather",
        ),
    }.items()
    for name in names
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vllm.distributed' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
