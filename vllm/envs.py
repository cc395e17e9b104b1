"""The one module that reads the process environment.

``variables`` maps each name to a function that reads and checks it; ``envs.NAME`` calls it. A
VLLM_ variable that vLLM knows and this engine does not have is refused by ``validate_environ``.
"""

import difflib
import logging
import os
import re
from collections.abc import Callable
from typing import Any

from vllm.errors import ConfigError, UnsupportedError


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


DEFAULT_CPU_KVCACHE_SPACE = 4.0

_LAYOUTS = ("NHD", "HND", "LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")

variables: dict[str, Callable[[], Any]] = {
    # GiB of KV cache on the CPU where --kv-cache-memory-bytes is not given. Unset or 0:
    # DEFAULT_CPU_KVCACHE_SPACE, or half of the free memory where that is less.
    "VLLM_CPU_KVCACHE_SPACE": _float("VLLM_CPU_KVCACHE_SPACE", 0.0),
    # "auto", or a list of cores such as 0-3,5 for the threads of the CPU kernels.
    "VLLM_CPU_OMP_THREADS_BIND": _str("VLLM_CPU_OMP_THREADS_BIND", "auto"),
    "VLLM_KV_CACHE_LAYOUT": _choice("VLLM_KV_CACHE_LAYOUT", None, _LAYOUTS),
    # Canaries, owner map and pool checks after every step.
    "VLLM_KV_CACHE_DEBUG": _bool("VLLM_KV_CACHE_DEBUG", False),
    # Python's own; where set, it seeds the block hashes too, so that engines agree on them.
    "PYTHONHASHSEED": _str("PYTHONHASHSEED", None),
    "VLLM_SSM_CONV_STATE_LAYOUT": _choice("VLLM_SSM_CONV_STATE_LAYOUT", None, ("SD", "DS")),
    "VLLM_CACHE_ROOT": _cache_root,
    "VLLM_LOGGING_LEVEL": _choice(
        "VLLM_LOGGING_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    ),
    "VLLM_ENABLE_V1_MULTIPROCESSING": _bool("VLLM_ENABLE_V1_MULTIPROCESSING", True),
    "VLLM_API_KEY": _str("VLLM_API_KEY", None),
    # Hashes in KV events: the last 64 bits as a number, or all bytes.
    "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": _bool("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", True),
    # Where a NIXL connector answers handshakes; nowhere else.
    "VLLM_NIXL_SIDE_CHANNEL_HOST": _str("VLLM_NIXL_SIDE_CHANNEL_HOST", "localhost"),
    "VLLM_NIXL_SIDE_CHANNEL_PORT": _int("VLLM_NIXL_SIDE_CHANNEL_PORT", 5600, minimum=1),
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": _int("VLLM_MOONCAKE_BOOTSTRAP_PORT", 8998, minimum=1),
    # Seconds that blocks wait to be fetched, and that one transfer may take.
    "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": _float("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", 480.0),
    "VLLM_MOONCAKE_CONNECTOR_TIMEOUT": _float("VLLM_MOONCAKE_CONNECTOR_TIMEOUT", 30.0),
    # Small sums of tensor-parallel GPUs through memory that all of them see, not through NCCL.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": _bool("VLLM_ALLREDUCE_USE_SYMM_MEM", True),
    # Comma-separated plug-in names to load; unset loads all, empty none.
    "VLLM_PLUGINS": _str("VLLM_PLUGINS", None),
    "VLLM_HOST_IP": _str("VLLM_HOST_IP", "127.0.0.1"),
    "VLLM_ENGINE_READY_TIMEOUT_S": _int("VLLM_ENGINE_READY_TIMEOUT_S", 600, minimum=1),
    # Where several processes keep their metrics, for prometheus_client to put together.
    "PROMETHEUS_MULTIPROC_DIR": _str("PROMETHEUS_MULTIPROC_DIR", None),
    # Routes for development and training: /sleep, /wake_up, /collective_rpc and the like.
    "VLLM_SERVER_DEV_MODE": _bool("VLLM_SERVER_DEV_MODE", False),
    "VLLM_LOG_STATS_INTERVAL": _float("VLLM_LOG_STATS_INTERVAL", 10.0),
    # 0 leaves logging to the program that imports vllm.
    "VLLM_CONFIGURE_LOGGING": _bool("VLLM_CONFIGURE_LOGGING", True),
    # JSON file for logging.config.dictConfig, in place of the engine's own format.
    "VLLM_LOGGING_CONFIG_PATH": _str("VLLM_LOGGING_CONFIG_PATH", None),
    # Text before every line of the log.
    "VLLM_LOGGING_PREFIX": _str("VLLM_LOGGING_PREFIX", ""),
}


_ACCEPTED_VALUES: dict[str, tuple[str, ...]] = {
    # There are no usage statistics here.
    "VLLM_DO_NOT_TRACK": ("1", "true"),
    "VLLM_NO_USAGE_STATS": ("1", "true"),
    # What this engine does anyway.
    "VLLM_USE_V1": ("1", "true"),
    "VLLM_WORKER_MULTIPROC_METHOD": ("spawn",),
    # Switches of features that this engine does not have, switched off.
    **dict.fromkeys(
        (
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            "VLLM_CPU_SGL_KERNEL",
            "VLLM_ENABLE_MOE_DP_CHUNK",
            "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
            "VLLM_TEST_FORCE_FP8_MARLIN",
            "VLLM_TRACE_FUNCTION",
            "VLLM_USE_DEEP_GEMM",
            "VLLM_USE_FLASHINFER_SAMPLER",
            "VLLM_USE_MODELSCOPE",
            "VLLM_USE_PRECOMPILED",
            "VLLM_USE_TRITON_FLASH_ATTN",
        ),
        ("0", "false"),
    ),
    "VLLM_DP_RANK": ("0",),
    "VLLM_DP_SIZE": ("1",),
}
"""Variables that change nothing here, and the values that ask for just that."""

# What Kubernetes sets in every pod for a Service whose name begins with vllm: its address, its
# ports, and links in Docker's style, such as VLLM_PORT=tcp://10.0.0.1:8000.
_SERVICE_LINK = re.compile(
    r"VLLM_(?:.*_)?(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_LINKED_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://\S+:\d+")

_OPTIONS = {"VLLM_ATTENTION_BACKEND": "--attention-backend"}
"""Variables that vLLM had, and the options that say it."""

_NOT_YET = frozenset(
    {
        "VLLM_CPU_NUM_OF_RESERVED_CPU",
        "VLLM_DISABLE_COMPILE_CACHE",
        "VLLM_DP_MASTER_IP",
        "VLLM_DP_MASTER_PORT",
        "VLLM_EC_SIDE_CHANNEL_HOST",
        "VLLM_FLASH_ATTN_VERSION",
        "VLLM_MOONCAKE_DISK_STAGING_USABLE_RATIO",
        "VLLM_MOONCAKE_LOAD_RECV_THREADS",
        "VLLM_MOONCAKE_STORE_TIER_LOG",
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT",
        "VLLM_P2P_SIDE_CHANNEL_HOST",
        "VLLM_PORT",
        "VLLM_PP_LAYER_PARTITION",
        "VLLM_RPC_TIMEOUT",
        "VLLM_TARGET_DEVICE",
        "VLLM_TORCH_PROFILER_DIR",
    }
)
"""Variables of vLLM that this engine does not have yet."""


def _is_service_link(name: str, value: str) -> bool:
    return bool(
        _SERVICE_LINK.fullmatch(name)
        or (name.endswith("_PORT") and _LINKED_ADDRESS.fullmatch(value))
    )


def _refusal(name: str, value: str) -> str | None:
    """Why ``name`` cannot be set, None where it can, or where nobody knows it."""
    if name in variables or value.lower() in _ACCEPTED_VALUES.get(name, ()):
        return None
    if _is_service_link(name, value):
        return None
    if name in _ACCEPTED_VALUES:
        accepted = ", ".join(_ACCEPTED_VALUES[name])
        return f"{name}={value}: vLLM has this; this engine does not yet (accepted: {accepted})"
    if name in _OPTIONS:
        return f"{name}: use the option {_OPTIONS[name]} instead, and unset the variable"
    if name in _NOT_YET:
        return f"{name}: vLLM has this; this engine does not yet; unset it"
    close = difflib.get_close_matches(name, variables, n=1, cutoff=0.8)
    return f"{name}: unknown environment variable; did you mean {close[0]}?" if close else None


def _is_unknown(name: str, value: str) -> bool:
    known = (*variables, *_ACCEPTED_VALUES, *_OPTIONS, *_NOT_YET)
    return name not in known and not _is_service_link(name, value)


def validate_environ(*, fail_on_unknown: bool = False) -> None:
    """Check every VLLM_ variable that is set: none is ignored silently.

    A variable that neither vLLM nor this engine knows (an image's own, say) is logged as a
    warning; one that looks like a misspelt one of ours is refused.

    Args:
        fail_on_unknown: refuse those that nobody knows, too.

    Raises:
        UnsupportedError: variables that vLLM has and this engine does not, or misspelt ones; one
            line each.
        ConfigError: the value of a known variable cannot work.
    """
    given = [(n, v) for n, v in sorted(os.environ.items()) if n.startswith("VLLM_")]
    refusals = []
    for name, value in given:
        refusal = _refusal(name, value)
        if refusal is None and _is_unknown(name, value):
            text = f"{name}: unknown environment variable"
            if fail_on_unknown:
                refusal = f"{text}; unset it"
            elif name not in _warned:
                _warned.add(name)
                logging.getLogger(__name__).warning("%s; it changes nothing", text)
        if refusal is not None:
            refusals.append(refusal)
    if refusals:
        raise UnsupportedError("\n".join(refusals), parameter=refusals[0].split(":")[0])
    for read in variables.values():
        read()


_warned: set[str] = set()


def export(name: str, value: str) -> None:
    """Set a variable for this process and for those that it starts."""
    assert name in variables, name
    os.environ[name] = value


def __getattr__(name: str) -> Any:
    if name in variables:
        return variables[name]()
    raise AttributeError(f"module 'vllm.envs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(variables)
