"""Which device this process runs on; ``current_platform`` is found when it is first used.

Order: a plug-in of the entry-point group ``vllm.platform_plugins`` (each names a function that
returns the dotted path of a ``Platform`` subclass, or None where its device is absent), then CUDA
if torch was built for it and a GPU is there, then the CPU. Finding out imports no torch.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.errors import ConfigError
from vllm.logger import init_logger
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

if TYPE_CHECKING:
    current_platform: Platform

logger = init_logger(__name__)

__all__ = [
    "DeviceCapability",
    "Platform",
    "PlatformEnum",
    "current_platform",
    "resolve_platform_path",
]

PLUGIN_GROUP = "vllm.platform_plugins"
_BUILTIN = {
    "cpu": "vllm.platforms.cpu.CpuPlatform",
    "cuda": "vllm.platforms.cuda.CudaPlatform",
}


def _torch_is_built_for_cuda() -> bool:
    """Read torch's version file; importing torch would take a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).parent / "version.py"
    if not version_file.is_file():
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", version_file.read_text(), re.MULTILINE) is not None


def _count_nvidia_gpus() -> int:
    """GPUs that the driver shows to this process; 0 without a driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "none"):
        return 0
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value if status == 0 else 0


def _plugin_platform_path() -> str | None:
    allowed = envs.VLLM_PLUGINS
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    found: dict[str, str] = {}
    for point in entry_points(group=PLUGIN_GROUP):
        if names is not None and point.name not in names:
            continue
        path = point.load()()
        if path is not None:
            found[point.name] = path
    if len(found) > 1:
        raise ConfigError(
            f"several platform plug-ins claim this machine ({', '.join(sorted(found))}); "
            "name the one to use in VLLM_PLUGINS",
            parameter="VLLM_PLUGINS",
        )
    return next(iter(found.values()), None)


def resolve_platform_path() -> str:
    """Dotted path of the platform class for this machine.

    Raises:
        ConfigError: more than one plug-in claims the machine.
    """
    plugin = _plugin_platform_path()
    if plugin is not None:
        return plugin
    if _torch_is_built_for_cuda() and _count_nvidia_gpus() > 0:
        return _BUILTIN["cuda"]
    return _BUILTIN["cpu"]


def platform_class(device_type: str) -> type[Platform]:
    """The built-in platform of ``device_type`` ("cpu" or "cuda"), whatever the machine has.

    Raises:
        ConfigError: an unknown device type.
    """
    if device_type not in _BUILTIN:
        raise ConfigError(
            f"--device must be one of {', '.join(_BUILTIN)}, not {device_type!r}",
            parameter="device",
            value=device_type,
        )
    return _load(_BUILTIN[device_type])


def _load(path: str) -> type[Platform]:
    module_name, _, class_name = path.rpartition(".")
    return getattr(importlib.import_module(module_name), class_name)


def __getattr__(name: str) -> Any:
    if name != "current_platform":
        raise AttributeError(f"module 'vllm.platforms' has no attribute {name!r}")
    platform = _load(resolve_platform_path())()
    globals()["current_platform"] = platform
    return platform
