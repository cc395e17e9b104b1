"""The CPU as a device: cores, memory limits, thread set-up."""

from __future__ import annotations

import os
import platform as host
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.errors import ConfigError
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig

logger = init_logger(__name__)

# torch's OpenMP threads spin this often for more work before they sleep (libgomp's default is
# 300,000, about 4 ms): long enough to bridge two operators, short enough to leave the core to the
# other processes of a small machine.
_GOMP_SPINCOUNT = "2000"


def parse_core_list(text: str) -> list[int]:
    """Cores named by a list such as ``0-3,5``, in the order given.

    Raises:
        ConfigError: not such a list.
    """
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"VLLM_CPU_OMP_THREADS_BIND must be 'auto', 'nobind' or a list of cores such as "
                f"0-3,5; {text!r} is none of these",
                parameter="VLLM_CPU_OMP_THREADS_BIND",
                value=text,
            )
        cores.extend(range(int(first), int(last if dash else first) + 1))
    return cores


def _cgroup_value(*names: str) -> str | None:
    for name in names:
        path = Path("/sys/fs/cgroup") / name
        if path.is_file():
            return path.read_text().strip()
    return None


def usable_cores() -> int:
    """Cores that the affinity mask and the container's CPU quota leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_value("cpu.max")
    if quota is not None:
        limit, _, period = quota.partition(" ")
        if limit != "max" and period:
            return max(1, min(cores or 1, int(limit) // int(period)))
    return cores or 1


@cache
def _cpu_model_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return host.processor() or host.machine()


class CpuPlatform(Platform):
    _enum = PlatformEnum.CPU
    device_name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    device_control_env_var = "CPU_VISIBLE_MEMORY_NODES"
    dist_backend = "gloo"
    worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    # Small enough that a shared prefix is found to within 31 tokens; the kernels gather pages of
    # 16 tokens at the speed of larger ones.
    default_block_size = 32
    has_sleep_mode = sys.platform == "linux"
    attention_backend_priority = ("CPU_ATTN", "CPU_MLA", "TORCH_REF", "TORCH_REF_MLA")

    @classmethod
    def prepare_environment(cls) -> None:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", _GOMP_SPINCOUNT)

    @classmethod
    def init_threads(cls, local_rank: int = 0, local_world_size: int = 1) -> int:
        """Size and bind the threads of torch and of the extension.

        The count is OMP_NUM_THREADS, else the length of VLLM_CPU_OMP_THREADS_BIND's core list
        (``0-3|4-7`` has one list per rank), else this rank's share of the usable cores. Only an
        explicit list binds threads: the cores are shared with the API server, and the kernel
        places threads better than a guess.

        Where the extension is built torch gets one thread: its teams wait for every member, which
        on cores that are shared costs a time slice whenever one member has been put aside (five
        times the run time of small operators, measured on two busy cores).
        """
        import torch

        from vllm import _custom_ops as ops

        bind = envs.VLLM_CPU_OMP_THREADS_BIND or "auto"
        cores = []
        if bind not in ("auto", "nobind"):
            lists = bind.split("|")
            if len(lists) < local_world_size:
                raise ConfigError(
                    f"VLLM_CPU_OMP_THREADS_BIND has {len(lists)} core lists for "
                    f"{local_world_size} ranks; separate one list per rank by '|'",
                    parameter="VLLM_CPU_OMP_THREADS_BIND",
                    value=bind,
                )
            cores = parse_core_list(lists[local_rank])
        if cores and hasattr(os, "sched_setaffinity"):
            missing = set(cores) - os.sched_getaffinity(0)
            if missing:
                raise ConfigError(
                    f"VLLM_CPU_OMP_THREADS_BIND names cores {sorted(missing)} that this process "
                    f"may not use; it may use {sorted(os.sched_getaffinity(0))}",
                    parameter="VLLM_CPU_OMP_THREADS_BIND",
                    value=bind,
                )
            os.sched_setaffinity(0, cores)
        count = cls._thread_count(len(cores) or max(1, usable_cores() // local_world_size))
        torch.set_num_threads(1 if ops.has_extension() else count)
        ops.set_num_threads(count, cores)
        return count

    @staticmethod
    def _thread_count(default: int) -> int:
        asked = os.environ.get("OMP_NUM_THREADS")
        if asked is None:
            return default
        first = asked.split(",")[0].strip()
        if not first.isdecimal() or int(first) < 1:
            raise ConfigError(
                f"OMP_NUM_THREADS must be a positive whole number, not {asked!r}",
                parameter="OMP_NUM_THREADS",
                value=asked,
            )
        return int(first)

    @classmethod
    def set_device(cls, local_rank: int) -> torch.device:
        import torch

        return torch.device("cpu")

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return _cpu_model_name()

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        import psutil

        total = psutil.virtual_memory().total
        limit = _cgroup_value("memory.max", "memory/memory.limit_in_bytes")
        if limit is not None and limit.isdecimal():
            return min(total, int(limit))
        return total

    @classmethod
    def get_device_available_memory(cls, device_id: int = 0) -> int:
        import psutil

        available = psutil.virtual_memory().available
        limit = _cgroup_value("memory.max", "memory/memory.limit_in_bytes")
        used = _cgroup_value("memory.current", "memory/memory.usage_in_bytes")
        if limit is None or used is None or not limit.isdecimal():
            return available
        return max(0, min(available, int(limit) - int(used)))

    @classmethod
    def check_config(cls, vllm_config: VllmConfig) -> None:
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ConfigError(
                "--pipeline-parallel-size must be 1 on the CPU",
                parameter="pipeline_parallel_size",
                value=parallel.pipeline_parallel_size,
            )

    @classmethod
    def describe(cls) -> dict[str, Any]:
        from vllm import _custom_ops as ops

        return {
            "device_type": "cpu",
            "device_name": _cpu_model_name(),
            "cores": usable_cores(),
            "kernels": ops.isa(),
        }
