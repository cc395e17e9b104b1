"""FLASHINFER: prefill, decode and cascade of flashinfer-python over the packed paged cache.

K and V are strided views ``(B, K, N, D)`` of the cache ("HND" to the library, whatever the
physical order), with nothing copied. The library plans a step on the host, once for each kind of
layer: the requests that decode at the front of the batch by its decode wrapper, which splits keys
over the device, the others by its prefill wrapper. On Blackwell data-centre GPUs its TRT-LLM
kernels take the block table as it is; they refuse odd strides even of axes of length 1, so those
are made canonical first.
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
from vllm.v1.attention.ops.triton_cascade import prefix_worth_sharing
from vllm.v1.kv_cache.views import canonicalize_singleton_dim_strides
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["FlashInferBackend", "FlashInferImpl", "FlashInferMetadata", "may_be_captured"]

_WORKSPACE_BYTES = 256 << 20
_FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_FROM_TENSOR_CORES = 4
"""Query heads of a KV head from which decodes run on tensor cores, as the library recommends."""


def may_be_captured(num_reqs: int, largest: int) -> bool:
    """A decode of so many requests can be that of a captured graph: 1, 2, 4, multiples of 8."""
    return num_reqs in (1, 2, 4, largest) or num_reqs % 8 == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What the library plans with; layers of one kind share a plan."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    page: int
    window: int
    soft_cap: float
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBuffers:
    """Where decodes that are replayed find their pages: int32, as long as any step needs."""

    ends: torch.Tensor
    pages: torch.Tensor
    last: torch.Tensor

    @staticmethod
    def make(max_num_seqs: int, max_pages: int, device: torch.device) -> DecodeBuffers:
        sizes = max_num_seqs + 1, max_num_seqs * max_pages, max_num_seqs
        ends, pages, last = (torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
        return DecodeBuffers(ends=ends, pages=pages, last=last)


class Planner:
    """The library's wrappers for each kind of layer, over one workspace.

    Decodes of a size that may be captured have wrappers of their own, which keep what they plan at
    fixed addresses: a captured graph reads what the latest plan of its size has left there.
    """

    def __init__(
        self, device: torch.device, max_num_seqs: int, max_model_len: int, captures: bool
    ) -> None:
        self._device = device
        self._max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self._captures = captures
        self._workspace: torch.Tensor | None = None
        self._buffers: dict[LayerKind, DecodeBuffers] = {}
        self._wrappers: dict[tuple[str, LayerKind, int], Any] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self.kinds: dict[LayerKind, None] = {}
        """Those that a step has had so far."""

    @property
    def workspace(self) -> torch.Tensor:
        if self._workspace is None:
            # The library counts on zeros in it at first.
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        return self._workspace

    def keeps_addresses(self, num_reqs: int) -> bool:
        return self._captures and may_be_captured(num_reqs, self._max_num_seqs)

    def wrapper(self, sort: str, kind: LayerKind, fixed_size: int = 0) -> Any:
        """``sort``: "decode", "prefill" or "cascade".

        ``fixed_size``: requests of a decode that may be captured; 0 for any other step.
        """
        key = (sort, kind, fixed_size)
        if key not in self._wrappers:
            flashinfer = library("flashinfer")
            if sort == "decode":
                made = self._decode_wrapper(flashinfer, kind, fixed_size)
            elif sort == "prefill":
                made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "HND")
            else:
                made = flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace, "HND")
            self._wrappers[key] = made
        return self._wrappers[key]

    def _decode_wrapper(self, flashinfer: Any, kind: LayerKind, fixed_size: int) -> Any:
        options: dict[str, Any] = {
            "use_tensor_cores": kind.num_heads // kind.num_kv_heads >= _FROM_TENSOR_CORES
        }
        if fixed_size:
            if kind not in self._buffers:
                pages = -(-self.max_model_len // kind.page)
                self._buffers[kind] = DecodeBuffers.make(self._max_num_seqs, pages, self._device)
            buffers = self._buffers[kind]
            options |= {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": buffers.ends[: fixed_size + 1],
                "paged_kv_indices_buffer": buffers.pages,
                "paged_kv_last_page_len_buffer": buffers.last[:fixed_size],
            }
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "HND", **options)

    def plan(self, wrapper: Any, *arguments: Any, **options: Any) -> Any:
        """``wrapper.plan``, once what its last plan copies from host memory has been copied."""
        copied = self._copied.get(id(wrapper))
        if copied is not None:
            copied.synchronize()
        wrapper.plan(*arguments, **options)
        if self._device.type == "cuda":
            self._copied.setdefault(id(wrapper), torch.cuda.Event()).record()
        return wrapper


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPart:
    """Tokens of a step that one wrapper attends for."""

    wrapper: Any
    tokens: slice
    is_cascade: bool = False


@dataclass(slots=True)
class FlashInferMetadata(PagedAttentionMetadata):
    """One step. The host's arrays are what the library plans from."""

    planner: Planner
    host_starts: torch.Tensor
    """(R + 1,) int32."""
    host_lens: np.ndarray
    num_decodes: int
    """Requests at the front of the batch that have one token."""
    prefix_len: int
    """Tokens, whole pages, that all requests share and are read once for all; 0 for none."""
    planned: dict[LayerKind, list[PlannedPart]]

    def pages(
        self, page: int, skip: int = 0, requests: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ends of the requests' pages and tokens in the last ones (host), and pages (device).

        Args:
            page: tokens of one.
            skip: pages at the start of each request that are left out.
            requests: which ones. Those without tokens fill a captured step up: they have no pages.
        """
        lens = self.host_lens[requests].astype(np.int64)
        counts = np.maximum(-(-lens // page) - skip, 0)
        ends = torch.zeros(counts.size + 1, dtype=torch.int32)
        ends[1:] = torch.from_numpy(counts.cumsum())
        total = int(ends[-1])
        device = self.block_table.device
        on_device = torch.from_numpy(counts).to(device, non_blocking=True)
        rows = torch.repeat_interleave(
            torch.arange(counts.size, device=device), on_device, output_size=total
        )
        first = on_device.cumsum(0) - on_device
        columns = torch.arange(total, device=device) - first[rows] + skip
        last = np.where(counts > 0, (lens - 1) % page + 1, 0)
        table = self.block_table[requests]
        return ends, table[rows, columns], torch.from_numpy(last.astype(np.int32))

    def plan(self, kind: LayerKind) -> list[PlannedPart]:
        """What attends for layers of a kind; planned once a step."""
        if kind not in self.planned:
            self.planner.kinds[kind] = None
            whole = kind.window == 0 and kind.kv_dtype == kind.dtype
            if self.prefix_len and self.causal and whole:
                self.planned[kind] = [self._plan_cascade(kind)]
            else:
                self.planned[kind] = self._plan_parts(kind)
        return self.planned[kind]

    def _plan_cascade(self, kind: LayerKind) -> PlannedPart:
        shared = self.prefix_len // kind.page
        ends, pages, last = self.pages(kind.page, shared)
        everything = torch.tensor([0, self.num_actual_tokens], dtype=torch.int32)
        wrapper = self.planner.plan(
            self.planner.wrapper("cascade", kind),
            [everything, self.host_starts],
            [torch.tensor([0, shared], dtype=torch.int32), ends],
            [self.block_table[0, :shared].contiguous(), pages],
            [torch.tensor([kind.page], dtype=torch.int32), last],
            *_sizes(kind),
            causal=True,
            **_options(kind),
        )
        return PlannedPart(
            wrapper=wrapper, tokens=slice(0, self.num_actual_tokens), is_cascade=True
        )

    def _plan_parts(self, kind: LayerKind) -> list[PlannedPart]:
        decodes, all_of_them = self.num_decodes, self.host_lens.size
        parts = []
        if decodes:
            pages = self.pages(kind.page, requests=slice(0, decodes))
            fixed = decodes == all_of_them and self.planner.keeps_addresses(decodes)
            wrapper = self.planner.wrapper("decode", kind, decodes if fixed else 0)
            self.planner.plan(wrapper, *pages, *_sizes(kind), **_options(kind))
            parts.append(PlannedPart(wrapper=wrapper, tokens=slice(0, decodes)))
        if decodes < all_of_them:
            starts = self.host_starts[decodes:] - self.host_starts[decodes]
            pages = self.pages(kind.page, requests=slice(decodes, None))
            wrapper = self.planner.plan(
                self.planner.wrapper("prefill", kind),
                starts,
                *pages,
                *_sizes(kind),
                causal=self.causal,
                **_options(kind),
            )
            parts.append(
                PlannedPart(wrapper=wrapper, tokens=slice(decodes, self.num_actual_tokens))
            )
        return parts


def _sizes(kind: LayerKind) -> tuple[int, int, int, int]:
    return kind.num_heads, kind.num_kv_heads, kind.head_size, kind.page


def _options(kind: LayerKind) -> dict[str, Any]:
    return {
        "window_left": kind.window - 1 if kind.window else -1,
        "logits_soft_cap": kind.soft_cap or None,
        "sm_scale": kind.scale,
        "q_data_type": kind.dtype,
        "kv_data_type": kind.kv_dtype,
    }


class FlashInferMetadataBuilder(AttentionMetadataBuilder[FlashInferMetadata]):
    """Plans decodes that may be replayed; other steps are planned by the first layer of a kind."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AttentionSpec)
        self._page = kv_cache_spec.block_size
        self._planner = Planner(
            device,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            captures=not vllm_config.model_config.enforce_eager,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashInferMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        lens = common.seq_lens_cpu[: common.num_reqs].numpy()
        longer = np.flatnonzero(np.diff(starts.numpy()) != 1)
        prefix = 0
        if common_prefix_len and not uses_trtllm():
            prefix = prefix_worth_sharing(
                common_prefix_len, common.num_reqs, int(lens.min()), self._page
            )
        step = FlashInferMetadata.of(
            common,
            planner=self._planner,
            host_starts=starts,
            host_lens=lens,
            num_decodes=int(longer[0]) if longer.size else common.num_reqs,
            prefix_len=prefix,
            planned={},
        )
        if step.num_decodes == common.num_reqs and self._planner.keeps_addresses(common.num_reqs):
            for kind in tuple(self._planner.kinds):
                step.plan(kind)
        return step


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
        if uses_trtllm():
            tokens = attn_metadata.num_actual_tokens
            self._by_trtllm(query[:tokens], views, attn_metadata, output[:tokens], k_scale, v_scale)
            return output
        kind = LayerKind(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            page=kv_cache.shape[2],
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            scale=self.scale,
            dtype=query.dtype,
            kv_dtype=kv_dtype,
        )
        for part in attn_metadata.plan(kind):
            queries, out = query[part.tokens], output[part.tokens]
            if part.is_cascade:
                out.copy_(part.wrapper.run(queries, views))
            else:
                part.wrapper.run(queries, views, k_scale=k_scale, v_scale=v_scale, out=out)
        return output

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
            # A bound for every step that a captured one stands for.
            library("flashinfer.decode").trtllm_batch_decode_with_kv_cache(
                query, caches, max_seq_len=step.planner.max_model_len, **shared
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
    fits_cuda_graphs = True

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
        return [16, 32, 64, 128, 256]

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
