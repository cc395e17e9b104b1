"""TRITON_ATTN_DIFFKV: keys and values of different width in one content, ``(B, H, N, D + Dv)``."""

from __future__ import annotations

from vllm.v1.attention.backends.rocm_attn import SplitAttentionBackend

__all__ = ["TritonAttentionDiffKVBackend"]


class TritonAttentionDiffKVBackend(SplitAttentionBackend):
    """The kernels over split views, for widths that TRITON_ATTN's tiles don't know."""

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN_DIFFKV"

    @classmethod
    def supports_head_size_v(cls, head_size: int, head_size_v: int) -> bool:
        return head_size_v in cls.get_supported_head_sizes()
