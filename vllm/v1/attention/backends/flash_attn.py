"""FLASH_ATTN and FLASH_ATTN_DIFFKV: prompts by flash-attn-4, over the packed paged cache.

K and V are strided views ``(B, N, K, D)`` of the cache, with nothing copied. On GPUs where the
library doesn't split one sequence's keys over the device (Hopper), requests with one query token
are our Triton kernels': the library then gets them as requests without queries. The library's
entry that writes into a given output is the one beneath its public function, whose result would
have to be copied; so the extra ``cuda`` names the library's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch

from vllm.errors import ConfigError
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.libraries import capability, library, why_missing
from vllm.v1.attention.backends.rocm_attn import SplitAttentionImpl
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.paged_attn import PagedAttention
from vllm.v1.attention.ops.triton_tails import clear_tails
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["FlashAttentionBackend", "FlashAttentionDiffKVBackend", "FlashAttentionMetadata"]


_MORE_THAN_A_TILE = 256
"""Queries, by any number of heads that share keys."""


@dataclass(slots=True)
class FlashAttentionMetadata(TritonAttentionMetadata):
    prompt_lens: torch.Tensor | None = None
    """(R,) int32: new tokens of requests with more than one, else 0; None where the library
    decodes too, and in steps of decodes."""


class FlashAttentionMetadataBuilder(TritonAttentionMetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        common = common_attn_metadata
        # Where the library decodes, it reads a shared prefix for each request.
        base = super().build(0 if splits_keys() else common_prefix_len, common, fast_build)
        prompt_lens = None
        if not splits_keys() and common.max_query_len > 1:
            counts = np.diff(common.query_start_loc_cpu[: common.num_reqs + 1].numpy())
            lens = torch.from_numpy(np.where(counts > 1, counts, 0).astype(np.int32))
            prompt_lens = lens.to(common.query_start_loc.device, non_blocking=True)
        values = {field.name: getattr(base, field.name) for field in fields(base)}
        return FlashAttentionMetadata(**values, prompt_lens=prompt_lens)


def splits_keys() -> bool:
    """The library splits one sequence's keys over several programs."""
    return capability() >= (10, 0)


class _WhereDecodesAreOurs:
    """True on GPUs where steps of decodes are our kernels', which captured graphs may hold."""

    def __get__(self, instance: object, owner: type) -> bool:
        return not splits_keys()


def check_alignment(*tensors: torch.Tensor) -> None:
    """The library would copy a tensor, a whole cache too, whose rows don't begin at 16 bytes.

    Raises:
        ConfigError: the pointer or a stride is not a multiple of 16 bytes.
    """
    for tensor in tensors:
        steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
        if tensor.stride(-1) != 1 or any(n % 16 for n in (tensor.data_ptr(), *steps)):
            raise ConfigError(
                f"--attention-backend FLASH_ATTN reads rows that begin at multiples of 16 bytes, "
                f"not a cache or query of strides {tensor.stride()} of {tensor.dtype}: choose "
                "TRITON_ATTN, or a --block-size that pads pages to a multiple of 16 bytes",
                parameter="attention_backend",
            )


class _FlashForward:
    """The forward of both impls; the other base is whose decode is used, and whose store."""

    head_size: int
    num_kv_heads: int
    scale: float
    sliding_window: int
    logits_soft_cap: float
    sinks: torch.Tensor | None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = attn_metadata
        if splits_keys() or step.max_query_len > 1:
            self._by_library(query, kv_cache, step, output)
        if step.plan is not None and not splits_keys():
            super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, replace(step, max_query_len=1), output
            )
        return output

    def _by_library(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: FlashAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        # It reads whole pages.
        clear_tails(kv_cache, step.block_table, step.query_start_loc, step.seq_lens)
        width_v = kv_cache.shape[3] - self.head_size
        keys, values = PagedAttention.split_kv_cache(
            kv_cache, self.num_kv_heads, self.head_size, width_v
        )
        tokens = step.num_actual_tokens
        check_alignment(query, keys, values, output)
        window = self.sliding_window - 1 if self.sliding_window else None
        # Below it compiles another kernel, for prompts of one tile.
        longest = max(step.max_query_len, _MORE_THAN_A_TILE) if step.max_query_len > 1 else 1
        library("flash_attn.cute.interface")._flash_attn_fwd(
            query[:tokens],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            cu_seqlens_q=step.query_start_loc,
            seqused_q=step.prompt_lens,
            max_seqlen_q=longest,
            seqused_k=step.seq_lens,
            max_seqlen_k=step.max_seq_len,
            page_table=step.block_table,
            softmax_scale=self.scale,
            causal=step.causal,
            window_size_left=window,
            window_size_right=None if step.causal else window,
            learnable_sink=None if self.sinks is None else self.sinks.detach(),
            softcap=self.logits_soft_cap,
            num_splits=0 if splits_keys() else 1,
            out=output[:tokens],
        )


class FlashAttentionImpl(_FlashForward, TritonAttentionImpl):  # type: ignore[misc]
    pass


class FlashAttentionDiffKVImpl(_FlashForward, SplitAttentionImpl):  # type: ignore[misc]
    pass


class FlashAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16"]
    forward_includes_kv_cache_update = False
    fits_cuda_graphs: ClassVar[Any] = _WhereDecodesAreOurs()

    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> Any:
        return FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return FlashAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Multiples of 8, as far as the tiles of this GPU reach."""
        if capability() >= (10, 0):
            return [*range(16, 129, 16), 256]
        return list(range(16, 257, 16))

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted)
        reasons += why_missing("flash_attn.cute")
        if capability() < (9, 0):
            reasons.append("needs an NVIDIA GPU of compute capability 9.0 or later")
        cache_dtype = wanted.get("kv_cache_dtype") or "auto"
        if cache_dtype not in ("auto", str(wanted["dtype"]).removeprefix("torch.")):
            reasons.append(f"a {cache_dtype} cache needs a model of that dtype")
        return reasons


class FlashAttentionDiffKVBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN_DIFFKV"

    @staticmethod
    def get_impl_cls() -> Any:
        return FlashAttentionDiffKVImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [*super().get_supported_head_sizes(), *([192] if capability() >= (10, 0) else [])]

    @classmethod
    def supports_head_size_v(cls, head_size: int, head_size_v: int) -> bool:
        if capability() >= (10, 0) and max(head_size, head_size_v) > 128:
            return (head_size, head_size_v) in ((192, 128), (256, 256))
        return head_size_v in FlashAttentionBackend.get_supported_head_sizes()
