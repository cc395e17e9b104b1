"""What the engine asks of a device; one subclass per kind, chosen in ``vllm.platforms``.

Owns the facts of a device (memory, names, defaults, which classes run on it). Must not know
models, caches or requests, and imports torch only inside the methods that need it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig

__all__ = ["DeviceCapability", "Platform", "PlatformEnum"]


class PlatformEnum(enum.Enum):
    CUDA = enum.auto()
    CPU = enum.auto()
    OOT = enum.auto()
    """Out of tree: a plug-in's."""
    UNSPECIFIED = enum.auto()


class DeviceCapability(NamedTuple):
    major: int
    minor: int

    def to_int(self) -> int:
        return self.major * 10 + self.minor


class Platform:
    """All members are class-level: a platform is used without being instantiated per device."""

    _enum: ClassVar[PlatformEnum] = PlatformEnum.UNSPECIFIED
    device_name: ClassVar[str] = ""
    device_type: ClassVar[str] = ""
    """What ``torch.device`` takes."""
    dispatch_key: ClassVar[str] = "CPU"
    ray_device_key: ClassVar[str] = ""
    device_control_env_var: ClassVar[str] = ""
    """Environment variable that hides devices from a process."""
    dist_backend: ClassVar[str] = "gloo"
    simple_compile_backend: ClassVar[str] = "eager"
    worker_cls: ClassVar[str] = ""
    """Dotted path of the worker class that ``--worker-cls auto`` means."""
    default_block_size: ClassVar[int] = 16
    """Tokens per manager block where --block-size is not given."""
    default_max_num_batched_tokens: ClassVar[int] = 2048
    """Tokens of a step where --max-num-batched-tokens is not given: enough to keep the matrix
    units busy, and no more than other requests can wait for."""
    runs_beside_host: ClassVar[bool] = False
    """A step runs while the host prepares the next one."""
    has_sleep_mode: ClassVar[bool] = False
    """Its workers can give their memory back and go on later."""
    supported_dtype_names: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    """Model dtypes, best first."""
    attention_backend_priority: ClassVar[tuple[str, ...]] = ()
    """Names in ``AttentionBackendEnum``, best first."""

    @classmethod
    def is_cuda(cls) -> bool:
        return cls._enum is PlatformEnum.CUDA

    @classmethod
    def is_cuda_alike(cls) -> bool:
        return cls._enum is PlatformEnum.CUDA

    @classmethod
    def is_cpu(cls) -> bool:
        return cls._enum is PlatformEnum.CPU

    @classmethod
    def is_out_of_tree(cls) -> bool:
        return cls._enum is PlatformEnum.OOT

    @classmethod
    def supported_dtypes(cls) -> list[torch.dtype]:
        import torch

        return [getattr(torch, name) for name in cls.supported_dtype_names]

    @classmethod
    def prepare_environment(cls) -> None:
        """Set process environment that must be there before torch is imported.

        Children inherit it. Never overrides what the user has set.
        """

    @classmethod
    def init_threads(cls, local_rank: int = 0, local_world_size: int = 1) -> int:
        """Set the host threads of this process up; returns how many compute threads it has."""
        return 1

    @classmethod
    def set_device(cls, local_rank: int) -> torch.device:
        """Make device ``local_rank`` the current one and return it."""
        import torch

        return torch.device(cls.device_type)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        raise NotImplementedError(f"{cls.__name__} does not name its devices")

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        """Compute capability, or None where the notion does not exist."""
        return None

    @classmethod
    def has_device_capability(cls, capability: tuple[int, int] | int, device_id: int = 0) -> bool:
        current = cls.get_device_capability(device_id)
        if current is None:
            return False
        if isinstance(capability, tuple):
            return current >= capability
        return current.to_int() >= capability

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes that this process could use if nothing else ran."""
        raise NotImplementedError(f"{cls.__name__} does not tell its memory")

    @classmethod
    def get_device_available_memory(cls, device_id: int = 0) -> int:
        """Bytes free now."""
        raise NotImplementedError(f"{cls.__name__} does not tell its free memory")

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: str | None,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool = False,
        has_sink: bool = False,
        attn_type: str | None = None,
    ) -> str | None:
        """Dotted path of an attention backend that this platform insists on.

        None, the default, lets ``vllm.v1.attention.selector`` take the first one of
        ``attention_backend_priority`` that can do what is asked.
        """
        return None

    @classmethod
    def check_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what this platform cannot do.

        Raises:
            ConfigError: naming the option and what works.
        """

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def synchronize(cls) -> None:
        """Wait until the device has done all that was queued."""

    @classmethod
    def seed_everything(cls, seed: int) -> None:
        """Seed Python's, numpy's and torch's generators."""
        import random

        import numpy as np
        import torch

        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Facts for ``vllm collect-env`` and the start-up log."""
        return {"device_type": cls.device_type, "device_name": cls.device_name}
