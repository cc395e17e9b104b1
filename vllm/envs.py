"""The one module that reads the process environment.

``variables`` maps each name to a function that reads and checks it; ``envs.NAME`` calls it. A
VLLM_ variable that vLLM knows and this engine does not have is refused by ``validate_environ``.
"""

import os
from collections.abc import Callable
from typing import Any

from vllm.errors import ConfigError


def _int(name: str, default: int, minimum: int = 0) -> Callable[[], int]:
    def read() -> int:
        raw = os.environ.get(name)
        if raw is None:
            return default
        try:
            value = int(raw)
        except ValueError:
            raise ConfigError(
                f"{name} must be a whole number, not {raw!r}", parameter=name, value=raw
            ) from None
        if value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, not {value}", parameter=name)
        return value

    return read


def _float(name: str, default: float) -> Callable[[], float]:
    def read() -> float:
        raw = os.environ.get(name)
        if raw is None:
            return default
        try:
            value = float(raw)
        except ValueError:
            raise ConfigError(
                f"{name} must be a number, not {raw!r}", parameter=name, value=raw
            ) from None
        if not value >= 0 or value == float("inf"):
            raise ConfigError(f"{name} must be finite and not negative", parameter=name)
        return value

    return read


def _bool(name: str, default: bool) -> Callable[[], bool]:
    def read() -> bool:
        raw = os.environ.get(name)
        if raw is None:
            return default
        if raw.lower() in ("1", "true"):
            return True
        if raw.lower() in ("0", "false", ""):
            return False
        raise ConfigError(f"{name} must be 0 or 1, not {raw!r}", parameter=name, value=raw)

    return read


def _str(name: str, default: str | None) -> Callable[[], str | None]:
    return lambda: os.environ.get(name, default)


def _choice(name: str, default: str | None, choices: tuple[str, ...]) -> Callable[[], str | None]:
    def read() -> str | None:
        raw = os.environ.get(name)
        if raw is None:
            return default
        if raw not in choices:
            raise ConfigError(
                f"{name} must be one of {', '.join(choices)}, not {raw!r}", parameter=name
            )
        return raw

    return read


def _cache_root() -> str:
    base = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    return os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT", os.path.join(base, "vllm")))


_LAYOUTS = ("NHD", "HND", "LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")

variables: dict[str, Callable[[], Any]] = {
    # GiB of KV cache on the CPU where --kv-cache-memory-bytes is not given.
    "VLLM_CPU_KVCACHE_SPACE": _float("VLLM_CPU_KVCACHE_SPACE", 4.0),
    # "auto", or a list of cores such as 0-3,5 for the OpenMP threads.
    "VLLM_CPU_OMP_THREADS_BIND": _str("VLLM_CPU_OMP_THREADS_BIND", "auto"),
    "VLLM_KV_CACHE_LAYOUT": _choice("VLLM_KV_CACHE_LAYOUT", None, _LAYOUTS),
    # Canaries, owner map and pool checks after every step.
    "VLLM_KV_CACHE_DEBUG": _bool("VLLM_KV_CACHE_DEBUG", False),
    "VLLM_SSM_CONV_STATE_LAYOUT": _choice("VLLM_SSM_CONV_STATE_LAYOUT", None, ("SD", "DS")),
    "VLLM_CACHE_ROOT": _cache_root,
    "VLLM_LOGGING_LEVEL": _choice(
        "VLLM_LOGGING_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    ),
    "VLLM_ENABLE_V1_MULTIPROCESSING": _bool("VLLM_ENABLE_V1_MULTIPROCESSING", True),
    "VLLM_API_KEY": _str("VLLM_API_KEY", None),
    # Comma-separated plug-in names to load; unset loads all, empty none.
    "VLLM_PLUGINS": _str("VLLM_PLUGINS", None),
    "VLLM_HOST_IP": _str("VLLM_HOST_IP", "127.0.0.1"),
    "VLLM_ENGINE_READY_TIMEOUT_S": _int("VLLM_ENGINE_READY_TIMEOUT_S", 600, minimum=1),
    "VLLM_LOG_STATS_INTERVAL": _float("VLLM_LOG_STATS_INTERVAL", 10.0),
}


def __getattr__(name: str) -> Any:
    if name in variables:
        return variables[name]()
    raise AttributeError(f"module 'vllm.envs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(variables)
