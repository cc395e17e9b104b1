"""Names of the attention backends, each with the dotted path of its class, resolved late."""

from __future__ import annotations

import difflib
import enum
from importlib import import_module
from typing import TYPE_CHECKING

from vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

__all__ = ["AttentionBackendEnum", "register_backend", "resolve_backend"]


class AttentionBackendEnum(enum.Enum):
    """A member's value is the path of the class that it means unless a plug-in overrides it."""

    FLASHINFER = "vllm.v1.attention.backends.flashinfer.FlashInferBackend"
    FLASHINFER_MLA = "vllm.v1.attention.backends.mla.flashinfer_mla.FlashInferMLABackend"
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    FLASH_ATTN_DIFFKV = "vllm.v1.attention.backends.flash_attn.FlashAttentionDiffKVBackend"
    FLASH_ATTN_MLA = "vllm.v1.attention.backends.mla.flash_attn_mla.FlashAttentionMLABackend"
    FLEX_ATTENTION = "vllm.v1.attention.backends.flex_attention.FlexAttentionBackend"
    ROCM_AITER_FA = "vllm.v1.attention.backends.rocm_aiter.AiterFlashAttentionBackend"
    ROCM_AITER_UNIFIED_ATTN = "vllm.v1.attention.backends.rocm_aiter.AiterUnifiedAttentionBackend"
    ROCM_ATTN = "vllm.v1.attention.backends.rocm_attn.RocmAttentionBackend"
    CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    CPU_MLA = "vllm.v1.attention.backends.mla.cpu_mla.CPUMLABackend"
    TORCH_REF = "vllm.v1.attention.backends.torch_ref.TorchRefBackend"
    TORCH_REF_MLA = "vllm.v1.attention.backends.mla.torch_ref_mla.TorchRefMLABackend"
    TRITON_MLA = "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend"
    TURBOQUANT = "vllm.v1.attention.backends.turboquant_attn.TurboQuantBackend"
    TRITON_ATTN = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    TRITON_ATTN_DIFFKV = (
        "vllm.v1.attention.backends.triton_attn_diffkv.TritonAttentionDiffKVBackend"
    )

    def get_path(self) -> str:
        return _overrides.get(self.name, self.value)

    def get_class(self) -> type[AttentionBackend]:
        return resolve_backend(self.get_path())

    @classmethod
    def from_name(cls, name: str) -> str:
        """Dotted path of the backend called ``name`` (case does not matter).

        Raises:
            ConfigError: no such backend; the message lists those there are.
        """
        key = name.upper()
        if key in _overrides:
            return _overrides[key]
        if key in cls.__members__:
            return cls[key].value
        known = sorted({*cls.__members__, *_overrides})
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--attention-backend must be one of {', '.join(known)}, not {name!r}{hint}",
            parameter="attention_backend",
            value=name,
        )


_overrides: dict[str, str] = {}


def register_backend(name: str, class_path: str) -> None:
    """Add a backend, or replace a built-in one, by the dotted path of its class."""
    _overrides[name.upper()] = class_path


def resolve_backend(path: str) -> type[AttentionBackend]:
    """Import the class that a dotted path names."""
    module_name, _, class_name = path.rpartition(".")
    return getattr(import_module(module_name), class_name)
