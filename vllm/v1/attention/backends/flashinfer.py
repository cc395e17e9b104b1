"""FLASHINFER: prefill, decode and cascade of flashinfer-python over the packed paged cache.

K and V are strided views ``(B, K, N, D)`` of the cache ("HND" to the library, whatever the
physical order), with nothing copied. The library plans a step on the host, once for each kind of
layer. On Blackwell data-centre GPUs its TRT-LLM kernels take the block table as it is; they refuse
odd strides even of axes of length 1, so those are made canonical first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.libraries import capability, library, why_missing
from vllm.v1.attention.backends.torch_ref import PagedAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.ops.paged_attn import PagedAttention
from vllm.v1.kv_cache.views import canonicalize_singleton_dim_strides
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["FlashInferBackend", "FlashInferImpl", "FlashInferMetadata"]

_WORKSPACE_BYTES = 256 << 20
_FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What the library plans with; layers of one kind share a plan."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int
    soft_cap: float
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype


class Planner:
    """The library's wrappers, one of a sort for each kind of layer, over one workspace."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace: torch.Tensor | None = None
        self._wrappers: dict[tuple[str, LayerKind], Any] = {}

    @property
    def workspace(self) -> torch.Tensor:
        if self._workspace is None:
            # The library counts on zeros in it at first.
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        return self._workspace

    def wrapper(self, sort: str, kind: LayerKind) -> Any:
        """``sort``: "decode", "prefill" or "cascade"."""
        if (sort, kind) not in self._wrappers:
            flashinfer = library("flashinfer")
            if sort == "decode":
                made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self.workspace,
                    "HND",
                    use_tensor_cores=kind.num_heads // kind.num_kv_heads >= 4,
                )
            elif sort == "prefill":
                made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "HND")
            else:
                made = flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace, "HND")
            self._wrappers[sort, kind] = made
        return self._wrappers[sort, kind]


@dataclass(slots=True)
class FlashInferMetadata(PagedAttentionMetadata):
    """One step. The host's arrays are what the library plans from."""

    planner: Planner
    host_starts: torch.Tensor
    """(R + 1,) int32."""
    host_lens: np.ndarray
    prefix_len: int
    """Tokens that all requests share from the start; 0 where none are known, or for one request."""
    planned: dict[LayerKind, Any]

    def pages(self, page: int, skip: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ends of the requests' pages and tokens in the last ones (host), and pages (device).

        Args:
            page: tokens of one.
            skip: pages at the start of each request that are left out.
        """
        counts = -(-self.host_lens.astype(np.int64) // page) - skip
        ends = torch.zeros(counts.size + 1, dtype=torch.int32)
        ends[1:] = torch.from_numpy(counts.cumsum())
        total = int(ends[-1])
        device = self.block_table.device
        on_device = torch.from_numpy(counts).to(device, non_blocking=True)
        requests = torch.repeat_interleave(
            torch.arange(counts.size, device=device), on_device, output_size=total
        )
        first = on_device.cumsum(0) - on_device
        columns = torch.arange(total, device=device) - first[requests] + skip
        last = torch.from_numpy(((self.host_lens - 1) % page + 1).astype(np.int32))
        return ends, self.block_table[requests, columns], last


class FlashInferMetadataBuilder(AttentionMetadataBuilder[FlashInferMetadata]):
    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AttentionSpec)
        self._planner = Planner(device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashInferMetadata:
        common = common_attn_metadata
        return FlashInferMetadata.of(
            common,
            planner=self._planner,
            host_starts=common.query_start_loc_cpu[: common.num_reqs + 1],
            host_lens=common.seq_lens_cpu[: common.num_reqs].numpy(),
            prefix_len=common_prefix_len if common.num_reqs > 1 else 0,
            planned={},
        )


def uses_trtllm() -> bool:
    """Blackwell data-centre GPUs: compute capability 10."""
    return capability()[0] == 10


class FlashInferImpl(TritonAttentionImpl):
    """Stores as TRITON_ATTN does: the bytes are the same."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FlashInferMetadata,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kv_dtype = _FP8.get(self.kv_cache_dtype, query.dtype)
        cache = kv_cache.view(kv_dtype) if kv_dtype != query.dtype else kv_cache
        views = PagedAttention.split_kv_cache(cache, self.num_kv_heads, self.head_size)
        scales = self.side_scales(layer)
        k_scale, v_scale = (1.0, 1.0) if scales is None else (scales.k, scales.v)
        tokens = attn_metadata.num_actual_tokens
        if uses_trtllm():
            self._by_trtllm(query[:tokens], views, attn_metadata, output[:tokens], k_scale, v_scale)
            return output
        kind = LayerKind(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            scale=self.scale * k_scale,
            dtype=query.dtype,
            kv_dtype=kv_dtype,
        )
        page = kv_cache.shape[2]
        if kind not in attn_metadata.planned:
            attn_metadata.planned[kind] = self._plan(kind, attn_metadata, page)
        sort, wrapper = attn_metadata.planned[kind]
        if sort == "cascade":
            output[:tokens] = wrapper.run(query[:tokens], views)
        else:
            wrapper.run(query[:tokens], views, v_scale=v_scale, out=output[:tokens])
        return output

    def _plan(self, kind: LayerKind, step: FlashInferMetadata, page: int) -> tuple[str, Any]:
        sizes = (kind.num_heads, kind.num_kv_heads, kind.head_size, page)
        options = {
            "window_left": kind.window - 1 if kind.window else -1,
            "logits_soft_cap": kind.soft_cap or None,
            "sm_scale": kind.scale,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.kv_dtype,
        }
        shared = step.prefix_len // page
        if shared and step.causal and not kind.window and kind.kv_dtype == kind.dtype:
            wrapper = step.planner.wrapper("cascade", kind)
            ends, pages, last = step.pages(page, shared)
            everything = torch.tensor([0, step.num_actual_tokens], dtype=torch.int32)
            wrapper.plan(
                [everything, step.host_starts],
                [torch.tensor([0, shared], dtype=torch.int32), ends],
                [step.block_table[0, :shared].contiguous(), pages],
                [torch.tensor([page], dtype=torch.int32), last],
                *sizes,
                causal=True,
                **options,
            )
            return "cascade", wrapper
        ends, pages, last = step.pages(page, 0)
        if step.max_query_len == 1:
            wrapper = step.planner.wrapper("decode", kind)
            wrapper.plan(ends, pages, last, *sizes, **options)
            return "decode", wrapper
        wrapper = step.planner.wrapper("prefill", kind)
        wrapper.plan(step.host_starts, ends, pages, last, *sizes, causal=step.causal, **options)
        return "prefill", wrapper

    def _by_trtllm(
        self,
        query: torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor],
        step: FlashInferMetadata,
        output: torch.Tensor,
        k_scale: float,
        v_scale: float,
    ) -> None:
        caches = tuple(canonicalize_singleton_dim_strides(view) for view in views)
        shared: dict[str, Any] = {
            "workspace_buffer": step.planner.workspace,
            "block_tables": step.block_table,
            "seq_lens": step.seq_lens,
            "bmm1_scale": self.scale * k_scale,
            "bmm2_scale": v_scale,
            "window_left": self.sliding_window - 1 if self.sliding_window else -1,
            "out": output,
            "kv_layout": "HND",
            "sinks": self.sinks,
        }
        if step.max_query_len == 1:
            library("flashinfer.decode").trtllm_batch_decode_with_kv_cache(
                query, caches, max_seq_len=step.max_seq_len, **shared
            )
            return
        key_starts = torch.zeros_like(step.query_start_loc)
        torch.cumsum(step.seq_lens, 0, out=key_starts[1:])
        library("flashinfer.prefill").trtllm_batch_context_with_kv_cache(
            query,
            caches,
            max_q_len=step.max_query_len,
            max_kv_len=step.max_seq_len,
            batch_size=step.seq_lens.shape[0],
            cum_seq_lens_q=step.query_start_loc,
            cum_seq_lens_kv=key_starts,
            causal=step.causal,
            **shared,
        )


class FlashInferBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16", *_FP8]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        return FlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        return FlashInferMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [16, 32, 64]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 128, 256]

    @classmethod
    def supports_sink(cls) -> bool:
        return uses_trtllm()

    @classmethod
    def supports_alibi(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted) + why_missing("flashinfer")
        if capability() < (8, 0):
            reasons.append("needs an NVIDIA GPU of compute capability 8.0 or later")
        cache_dtype = wanted.get("kv_cache_dtype") or "auto"
        own = str(wanted["dtype"]).removeprefix("torch.")
        if cache_dtype in ("bfloat16", "float16") and cache_dtype != own:
            reasons.append(f"a {cache_dtype} cache needs a model of that dtype")
        return reasons
