"""Which attention backend a layer gets: a pure choice among classes that declare what they can.

A candidate that cannot serve a layer gives its reasons; where none can, all reasons are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from vllm.errors import ConfigError
from vllm.platforms import current_platform
from vllm.v1.attention.backends.libraries import capability
from vllm.v1.attention.backends.registry import AttentionBackendEnum, resolve_backend

if TYPE_CHECKING:
    import torch

    from vllm.v1.attention.backend import AttentionBackend

__all__ = ["MEASURED", "Measured", "get_attn_backend"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was fastest on one architecture, by ``benchmarks/kernels/vendor_attention.py``.

    Attributes:
        backend: tried before the platform's own order.
        prompts, decodes: whose kernels it runs there, each the faster one.
        source: the run.
    """

    backend: str
    prompts: str
    decodes: str
    source: str


MEASURED: Mapping[int, Measured] = MappingProxyType(
    {
        9: Measured(
            backend="FLASH_ATTN",
            prompts="flash-attn-4",
            decodes="TRITON_ATTN",
            source="benchmarks/results/h100_vendor_attention.json",
        )
    }
)
"""By the major compute capability of NVIDIA GPUs; others have not been measured."""


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    block_size: int | None = None,
    use_mla: bool = False,
    has_sink: bool = False,
    attn_type: str = "decoder",
    backend: str | None = None,
    head_size_v: int | None = None,
    has_alibi: bool = False,
) -> type[AttentionBackend]:
    """The first backend of the platform's order that can serve such a layer, or ``backend``.

    Args:
        head_size: D of the layer.
        dtype: dtype of its activations.
        kv_cache_dtype: --kv-cache-dtype; None means "auto".
        block_size: tokens per manager block, None if the planner is still free to choose.
        use_mla, has_sink, attn_type, has_alibi: what the layer needs.
        backend: the name given by --attention-backend; no other is tried then.
        head_size_v: width of a value where it is another than D.

    Raises:
        ConfigError: the named backend is unknown or cannot; or no candidate can.
    """
    path = current_platform.get_attn_backend_cls(
        backend, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, attn_type
    )
    if path is not None:
        return resolve_backend(path)
    names = (backend,) if backend else _order()
    declined: list[str] = []
    for name in names:
        candidate = resolve_backend(AttentionBackendEnum.from_name(name))
        reasons = candidate.validate_configuration(
            head_size=head_size,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype or "auto",
            block_size=block_size,
            use_mla=use_mla,
            has_sink=has_sink,
            attn_type=attn_type,
            head_size_v=head_size_v,
            has_alibi=has_alibi,
        )
        if not reasons:
            return candidate
        declined.append(f"{candidate.get_name()}: {', '.join(reasons)}")
    raise ConfigError(
        f"no attention backend can serve head size {head_size}, {dtype}, --kv-cache-dtype "
        f"{kv_cache_dtype or 'auto'}, --block-size {block_size}: {'; '.join(declined)}",
        parameter="attention_backend",
        value=backend,
    )


def _order() -> tuple[str, ...]:
    """Candidates, best first: what was measured on this GPU, then the platform's."""
    names = current_platform.attention_backend_priority
    measured = MEASURED.get(capability()[0]) if current_platform.is_cuda() else None
    return names if measured is None else (measured.backend, *names)
