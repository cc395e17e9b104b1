"""TRITON_ATTN: our own Triton kernels over the packed cache, on any layout.

Decodes split their KV over the device; prompts run in tiles that share each page among the query
heads of a KV head. Runs on NVIDIA GPUs, and on the CPU under TRITON_INTERPRET=1 for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import triton

from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.torch_ref import PagedAttentionImpl, PagedAttentionMetadata
from vllm.v1.attention.ops.kv_formats import FORMATS, kv_format
from vllm.v1.attention.ops.triton_byte_decode import decode_waves
from vllm.v1.attention.ops.triton_cascade import (
    CascadePlan,
    cascade_attention,
    plan_cascade,
    prefix_worth_sharing,
)
from vllm.v1.attention.ops.triton_decode import DecodePlan, make_plan_buffers, plan_decodes
from vllm.v1.attention.ops.triton_kv_store import rotate_and_store
from vllm.v1.attention.ops.triton_paged_attention import paged_attention
from vllm.v1.kv_cache.content import KVQuantMode
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["TritonAttentionBackend", "TritonAttentionImpl", "TritonAttentionMetadata"]


@dataclass(slots=True)
class TritonAttentionMetadata(PagedAttentionMetadata):
    """``plan`` is None where no request has exactly one query token."""

    plan: DecodePlan | None
    cascade: CascadePlan | None = None
    """Of a step of decodes behind a prefix that they share, where that pays."""


class TritonAttentionMetadataBuilder(AttentionMetadataBuilder[TritonAttentionMetadata]):
    """Plans the decodes of a step, into buffers that stay where they are.

    What a launch for a batch of decodes looks like depends on the number of requests alone, so a
    CUDA graph captured with one step's metadata runs with any later one of as many requests. With
    prompts the number of tokens counts, too, and there always is a plan.
    """

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._window = getattr(kv_cache_spec, "sliding_window", None) or 0
        self._max_seq_len = vllm_config.model_config.max_model_len
        assert isinstance(kv_cache_spec, AttentionSpec)
        self._kv_heads = kv_cache_spec.num_kv_heads
        mode = kv_cache_spec.kv_quant_mode
        has_bytes = mode is not KVQuantMode.NONE
        self._buffers = make_plan_buffers(
            vllm_config.scheduler_config.max_num_seqs,
            self._kv_heads,
            self._max_seq_len,
            device,
            decode_waves(has_bytes, kv_cache_spec.head_size),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonAttentionMetadata:
        common = common_attn_metadata
        plan = None
        starts = common.query_start_loc_cpu.numpy()
        if common.is_captured or common.max_query_len == 1 or (np.diff(starts) == 1).any():
            plan = plan_decodes(
                common.seq_lens,
                common.query_start_loc,
                self._kv_heads,
                self._max_seq_len,
                self._window,
                self._buffers,
            )
        return TritonAttentionMetadata.of(
            common, plan=plan, cascade=self._cascade(common_prefix_len, common)
        )

    def _cascade(
        self, common_prefix_len: int, common: CommonAttentionMetadata
    ) -> CascadePlan | None:
        if not common_prefix_len or common.max_query_len > 1 or self._window:
            return None
        page = self.kv_cache_spec.block_size
        lens = common.seq_lens_cpu[: common.num_reqs]
        prefix = prefix_worth_sharing(common_prefix_len, common.num_reqs, int(lens.min()), page)
        if not prefix:
            return None
        return plan_cascade(
            prefix,
            page,
            common.seq_lens,
            common.query_start_loc,
            self._kv_heads,
            common.max_seq_len,
        )


class TritonAttentionImpl(PagedAttentionImpl[TritonAttentionMetadata]):
    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = attn_metadata
        # Bytes of quantised caches, and biases by distance, are the other kernels'.
        if step.cascade is not None and self.format is None and self.alibi_slopes is None:
            cascade_attention(
                query[: step.num_actual_tokens],
                kv_cache,
                output[: step.num_actual_tokens],
                step.cascade,
                query_start_loc=step.query_start_loc,
                block_table=step.block_table,
                max_seq_len=step.max_seq_len,
                scale=self.scale,
                soft_cap=self.logits_soft_cap,
                sinks=self.sinks,
            )
            return output
        paged_attention(
            query,
            kv_cache,
            output,
            query_start_loc=attn_metadata.query_start_loc,
            seq_lens=attn_metadata.seq_lens,
            block_table=attn_metadata.block_table,
            max_query_len=attn_metadata.max_query_len,
            max_seq_len=attn_metadata.max_seq_len,
            has_decodes=attn_metadata.plan is not None,
            plan=attn_metadata.plan,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            causal=attn_metadata.causal,
            fmt=self.format,
            scales=self.side_scales(layer),
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        rotate_and_store(
            None,
            key,
            value,
            kv_cache,
            slot_mapping,
            fmt=self.format,
            scales=self.side_scales(layer),
        )

    def fused_rope_kvcache_supported(self) -> bool:
        return True

    def fused_head_norms_supported(self) -> bool:
        return True

    def do_rope_and_kv_cache_update(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        head_norms: tuple[Any, Any] | None = None,
    ) -> None:
        weights, eps = None, 0.0
        if head_norms is not None:
            weights = head_norms[0].weight_data, head_norms[1].weight_data
            eps = head_norms[0].variance_epsilon
        rotate_and_store(
            query,
            key,
            value,
            kv_cache,
            slot_mapping,
            positions,
            cos_sin_cache,
            is_neox,
            weights,
            eps,
            self.format,
            self.side_scales(layer),
        )


class TritonAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "bfloat16",
        "float16",
        "float32",
        *FORMATS,
    ]
    forward_includes_kv_cache_update = False
    fits_cuda_graphs = True
    fits_prompt_graphs = True

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @staticmethod
    def get_impl_cls() -> type[PagedAttentionImpl]:
        return TritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return TritonAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(16, 257, 16))

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted)
        if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
            reasons.append("needs a GPU (or TRITON_INTERPRET=1)")
        cache_dtype = wanted.get("kv_cache_dtype") or "auto"
        fmt = kv_format(cache_dtype)
        if fmt is None:
            if cache_dtype not in ("auto", str(wanted["dtype"]).removeprefix("torch.")):
                reasons.append(f"a {cache_dtype} cache needs a model of that dtype")
            return reasons
        is_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
        if fmt.dtype.is_floating_point and is_old:
            reasons.append("fp8 needs a GPU of compute capability 8.9 or later")
        return reasons
