"""Stand-ins for libraries that don't run here: their signatures, their checks, float64 inside.

Each refuses what the library refuses, or would copy: strides that its loads can't take, offsets
that aren't aligned, indices of another type. Signatures are those of flash-attn-4 4.0.0b36,
flashinfer-python 0.6.14 and aiter's documentation.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm import _torch_ops

HALF = (torch.float16, torch.bfloat16)


def check_aligned(tensor: torch.Tensor, size: int = 16) -> None:
    """What the libraries' vector loads need; flash-attn-4 copies a tensor that isn't so."""
    assert tensor.stride(-1) == 1
    assert tensor.data_ptr() % size == 0
    assert all(stride * tensor.element_size() % size == 0 for stride in tensor.stride()[:-1])


def check_indices(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or (tensor.dtype == torch.int32 and tensor.stride(-1) == 1)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    **features: Any,
) -> torch.Tensor:
    """Float64 attention over ``(B, H, N, D)`` and ``(B, H, N, Dv)``; (T, Q, Dv) in q's dtype."""
    exact = torch.zeros(*q.shape[:2], values.shape[3], dtype=torch.float64)
    cache = torch.cat((keys.double(), values.double()), dim=-1)
    _torch_ops.paged_attention(q.double(), cache, exact, starts, lens, table, scale, **features)
    return exact.to(q.dtype)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    out = q.new_full((*q.shape[:2], v.shape[3]), float("nan"))
    _flash_attn_fwd(
        q, k, v, qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        min_seqlen_k, page_table, softmax_scale, causal, softcap, *window_size, learnable_sink,
        num_splits=num_splits, out=out, gather_kv_indices=gather_kv_indices, **unused,
    )  # fmt: skip
    return out, None


def _flash_attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: torch.Tensor | None = None,
    num_splits: int = 1,
    out: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None, None, None, None]:
    assert not unused and page_table is not None and cu_seqlens_k is gather_kv_indices is None
    assert q.dtype in HALF and q.dtype == k.dtype == v.dtype
    assert page_table.shape[0] == cu_seqlens_q.shape[0] - 1
    assert k.shape[:3] == v.shape[:3]
    assert out.shape == (*q.shape[:2], v.shape[3]) and out.dtype == q.dtype
    assert learnable_sink is None or not learnable_sink.requires_grad
    check_indices(page_table, cu_seqlens_q, seqused_q, seqused_k)
    for tensor in (q, k, v, out):
        check_aligned(tensor)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if qv is not None:
        assert v.shape[3] == 512 and q.shape[2] in (64, 512) and qv.shape[2] == 512
        check_aligned(qv)
        q, keys = torch.cat((q, qv), -1), torch.cat((keys, values), -1)
    page = k.shape[1]
    used = cu_seqlens_q.diff() if seqused_q is None else seqused_q
    rows = zip(page_table.tolist(), seqused_k.tolist(), used.tolist(), strict=True)
    for row, length, queries in rows:
        if length % page and queries:
            # Pages are loaded whole: what lies behind the last token must be finite.
            assert v[row[length // page], length % page :].isfinite().all()
    window = 0 if window_size_left is None else window_size_left + 1
    found = attend(
        q, keys.nan_to_num(), values.nan_to_num(), cu_seqlens_q, seqused_k, page_table,
        softmax_scale, causal=causal, sliding_window=window, logits_soft_cap=softcap,
        sinks=learnable_sink,
    )  # fmt: skip
    for start, queries in zip(cu_seqlens_q.tolist(), used.tolist(), strict=False):
        out[start : start + queries] = found[start : start + queries]
    return out, None, None, None, None


class Pages:
    """What both of flashinfer's wrappers know after ``plan``."""

    def __init__(
        self,
        workspace: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        **options: Any,
    ) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "HND"
        self.fixed = options if use_cuda_graph else None

    def take(
        self, starts, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size,
        causal, window_left=-1, logits_soft_cap=None, sm_scale=None, q_data_type=torch.float16,
        kv_data_type=None,
    ) -> None:  # fmt: skip
        check_indices(starts, indptr, indices, last_page_len)
        counts = indptr.diff().tolist()
        assert indices.shape == (sum(counts),)
        self.lens = torch.tensor(
            [
                (count - 1) * page_size + last if count else 0
                for count, last in zip(counts, last_page_len.tolist(), strict=True)
            ]
        )
        self.table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in zip(self.table, indices.split(counts), strict=True):
            row[: len(pages)] = pages
        self.starts, self.sizes = starts, (heads, kv_heads, head_dim, page_size)
        self.dtypes = q_data_type, kv_data_type or q_data_type
        self.features = {
            "causal": causal, "scale": sm_scale, "sliding_window": window_left + 1,
            "logits_soft_cap": logits_soft_cap or 0.0,
        }  # fmt: skip

    def attend(
        self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], k_scale: float = 1.0
    ) -> torch.Tensor:
        keys, values = cache
        heads, kv_heads, head_dim, page = self.sizes
        assert q.shape[1:] == (heads, head_dim) and q.dtype == self.dtypes[0]
        assert keys.shape[1:] == values.shape[1:] == (kv_heads, page, head_dim)
        assert keys.dtype == self.dtypes[1]
        assert keys.stride() == values.stride()
        for tensor in (q, keys, values):
            check_aligned(tensor)
        features = dict(self.features)
        scale = features.pop("scale") * k_scale
        plain = [part.float().nan_to_num() for part in cache]
        return attend(q, *plain, self.starts, self.lens, self.table, scale, **features)


class BatchDecodeWithPagedKVCacheWrapper(Pages):
    def plan(self, indptr, indices, last_page_len, *sizes, **options) -> None:
        starts = torch.arange(len(indptr), dtype=torch.int32)
        if self.fixed is not None:
            assert len(self.fixed["paged_kv_last_page_len_buffer"]) == len(last_page_len)
            assert len(self.fixed["paged_kv_indptr_buffer"]) == len(indptr)
            kept = self.fixed["paged_kv_indices_buffer"][: len(indices)]
            indices = kept.copy_(indices)
        self.take(starts, indptr, indices, last_page_len, *sizes, causal=True, **options)

    def run(self, q, paged_kv_cache, *, k_scale=None, v_scale=None, out=None) -> torch.Tensor:
        out.copy_(self.attend(q, paged_kv_cache, k_scale or 1.0) * (v_scale or 1.0))
        return out


class BatchPrefillWithPagedKVCacheWrapper(Pages):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *sizes,
        causal=False, **options,
    ) -> None:  # fmt: skip
        self.take(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *sizes,
            causal=causal, **options,
        )  # fmt: skip

    def run(self, q, paged_kv_cache, *, k_scale=None, v_scale=None, out=None) -> torch.Tensor:
        out.copy_(self.attend(q, paged_kv_cache, k_scale or 1.0) * (v_scale or 1.0))
        return out


class MultiLevelCascadeAttentionWrapper(Pages):
    """Two levels: pages that all share, then each request's own."""

    def __init__(self, num_levels: int, workspace: torch.Tensor, kv_layout: str = "NHD") -> None:
        super().__init__(workspace, kv_layout)
        assert num_levels == 2

    def plan(
        self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len,
        *sizes, causal=False, **options,
    ) -> None:  # fmt: skip
        everything, starts = qo_indptr_arr
        assert everything.tolist() == [0, int(starts[-1])]
        (shared, *_), (ends, own) = (
            (paged_kv_indices_arr[0], paged_kv_indptr_arr[0]),
            (paged_kv_indptr_arr[1], paged_kv_indices_arr[1]),
        )
        assert paged_kv_indptr_arr[0].tolist() == [0, len(shared)]
        assert paged_kv_last_page_len[0].tolist() == [sizes[3]]
        pages = [torch.cat((shared, part)) for part in own.split(ends.diff().tolist())]
        all_ends = ends + len(shared) * torch.arange(len(ends), dtype=torch.int32)
        self.take(
            starts, all_ends, torch.cat(pages), paged_kv_last_page_len[1], *sizes, causal=causal,
            **options,
        )  # fmt: skip

    def run(self, q, paged_kv_cache) -> torch.Tensor:
        return self.attend(q, paged_kv_cache)


def _check_dense_singletons(tensor: torch.Tensor) -> None:
    """The tensor-copy engine's rule: an axis of length 1 has the stride of a dense tensor."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size == 1:
            assert stride == expected, f"stride {stride} of an axis of length 1, not {expected}"
        expected = stride * size


def trtllm_batch_decode_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0,
    bmm2_scale=1.0, window_left=-1, out=None, sinks=None, kv_layout="HND",
) -> torch.Tensor:  # fmt: skip
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    return trtllm_batch_context_with_kv_cache(
        query, kv_cache, workspace_buffer, block_tables, seq_lens, 1, max_seq_len, bmm1_scale,
        bmm2_scale, len(seq_lens), starts, None, window_left, out, kv_layout, sinks,
    )  # fmt: skip


def trtllm_batch_context_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_q_len, max_kv_len, bmm1_scale,
    bmm2_scale, batch_size, cum_seq_lens_q, cum_seq_lens_kv, window_left=-1, out=None,
    kv_layout="HND", sinks=None, causal=True,
) -> torch.Tensor:  # fmt: skip
    assert kv_layout == "HND" and batch_size == len(seq_lens) and workspace_buffer.numel()
    check_indices(block_tables, seq_lens, cum_seq_lens_q, cum_seq_lens_kv)
    if cum_seq_lens_kv is not None:
        assert cum_seq_lens_kv.diff().tolist() == seq_lens.tolist()
    for tensor in kv_cache:
        check_aligned(tensor)
        _check_dense_singletons(tensor)
    plain = [part.float().nan_to_num() for part in kv_cache]
    result = attend(
        query, *plain, cum_seq_lens_q, seq_lens, block_tables, bmm1_scale, causal=causal,
        sliding_window=window_left + 1, sinks=sinks,
    )  # fmt: skip
    return out.copy_(result * bmm2_scale)


class BatchMLAPagedAttentionWrapper:
    def __init__(self, float_workspace_buffer: torch.Tensor) -> None:
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe,
        page_size, causal, sm_scale, q_data_type, kv_data_type,
    ) -> None:  # fmt: skip
        check_indices(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        assert (head_dim_ckv, head_dim_kpe) == (512, 64) and q_data_type == kv_data_type
        counts = kv_indptr.diff().tolist()
        assert counts == [-(-n // page_size) for n in kv_len_arr.tolist()]
        self.table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in zip(self.table, kv_indices.split(counts), strict=True):
            row[: len(pages)] = pages
        self.starts, self.lens, self.scale = qo_indptr, kv_len_arr, sm_scale
        self.heads, self.causal = num_heads, causal

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache) -> torch.Tensor:
        assert q_nope.shape[1] == self.heads
        for tensor in (q_nope, q_pe, ckv_cache, kpe_cache):
            check_aligned(tensor)
        latents, rotated = (part.nan_to_num()[:, None] for part in (ckv_cache, kpe_cache))
        return attend(
            torch.cat((q_nope, q_pe), -1), torch.cat((latents, rotated), -1), latents, self.starts,
            self.lens, self.table, self.scale, causal=self.causal,
        )  # fmt: skip


def aiter_flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, logits_soft_cap=0.0, causal=False, window_size=(-1, -1), bias=None,
    alibi_slopes=None, deterministic=False, return_lse=False, return_attn_probs=False,
    block_table=None, out=None,
) -> torch.Tensor:  # fmt: skip
    check_indices(cu_seqlens_q, cu_seqlens_k)
    for tensor in (q, k, v):
        check_aligned(tensor)
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    starts, lens = cu_seqlens_q.tolist(), cu_seqlens_q.diff()
    for request, length in enumerate(lens.tolist()):
        part = slice(starts[request], starts[request + 1])
        out[part] = attend(
            q[part], k[None, part].transpose(1, 2), v[None, part].transpose(1, 2),
            torch.tensor([0, length]), lens[request : request + 1],
            torch.zeros(1, 1, dtype=torch.int32), softmax_scale, causal=causal,
            sliding_window=window_size[0] + 1, alibi_slopes=alibi_slopes,
        )  # fmt: skip
    return out


def unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, softcap, q_descale, k_descale, v_descale, alibi_slopes=None,
    output_scale=None, qq_bias=None, sinks=None,
) -> None:  # fmt: skip
    assert causal and q_descale is None and k.shape == v.shape
    check_indices(block_table, cu_seqlens_q, seqused_k)
    for tensor in (q, k, v):
        check_aligned(tensor)
    plain = [part.transpose(1, 2).nan_to_num() for part in (k, v)]
    out.copy_(
        attend(
            q, *plain, cu_seqlens_q, seqused_k, block_table, softmax_scale,
            sliding_window=window_size[0] + 1, logits_soft_cap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks,
        )
    )  # fmt: skip


MODULES: dict[str, dict[str, Any]] = {
    "flash_attn": {},
    "flash_attn.cute": {},
    "flash_attn.cute.interface": {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "_flash_attn_fwd": _flash_attn_fwd,
    },
    "flashinfer": {
        "BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper,
        "BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper,
        "MultiLevelCascadeAttentionWrapper": MultiLevelCascadeAttentionWrapper,
    },
    "flashinfer.decode": {"trtllm_batch_decode_with_kv_cache": trtllm_batch_decode_with_kv_cache},
    "flashinfer.prefill": {
        "trtllm_batch_context_with_kv_cache": trtllm_batch_context_with_kv_cache
    },
    "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": BatchMLAPagedAttentionWrapper},
    "aiter": {"flash_attn_varlen_func": aiter_flash_attn_varlen_func},
    "aiter.ops.triton.unified_attention": {"unified_attention": unified_attention},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``library`` find the stand-ins, until the test ends."""
    from vllm.v1.attention.backends import libraries

    modules = {}
    for name, contents in MODULES.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(contents)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(libraries, "why_missing", lambda module: [])
    libraries.library.cache_clear()
