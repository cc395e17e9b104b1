"""TRITON_MLA: attention over a cache of latents by our own Triton kernels, on any layout.

Decodes, and chunks of few tokens, attend to the latents themselves (``forward_mqa``), split over
the device by the plan of ``triton_shares``. Prompts have the latents they see expanded to keys and
values of as many heads at a time as a bound on memory allows (``forward_mha``). Runs on NVIDIA
GPUs, and on the CPU under TRITON_INTERPRET=1 for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import triton

from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.common import MLAImpl
from vllm.v1.attention.backends.mla.cpu_mla import tokens_worth_expanding
from vllm.v1.attention.backends.torch_ref import PagedAttentionMetadata
from vllm.v1.attention.ops.triton_mla import (
    absorbed_attention,
    make_absorbed_buffers,
    store_latents,
)
from vllm.v1.attention.ops.triton_mla_prefill import (
    attention_tiles,
    expand_latents,
    expand_tiles,
    expanded_attention,
)
from vllm.v1.attention.ops.triton_shares import SharePlan, plan_shares
from vllm.v1.kv_cache_interface import KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["TritonMLABackend", "TritonMLAImpl", "TritonMLAMetadata"]

_EXPANDED_BYTES = 512 << 20
"""Keys and values in memory at a time: those of as many heads as fit, one at least."""
_EXPANDING_IS_CHEAPER_BY = 4
"""A chunk that attends to latents reads them once a token; expanding reads them once."""


@dataclass(slots=True)
class Absorbed:
    """Tokens that attend to latents, each as a request of its own."""

    rows: torch.Tensor | None
    """(n,) int64 tokens of the step; None where they are all of them."""
    plan: SharePlan
    query_start_loc: torch.Tensor
    """(n + 1,) int32."""
    seq_lens: torch.Tensor
    """(n,) int32."""
    block_table: torch.Tensor
    """(n, max blocks) int32."""
    host_lens: np.ndarray
    """(n,) ``seq_lens`` in host memory."""
    library_plans: dict[Any, Any] = field(default_factory=dict)
    """What a library has planned for this step, by what it has planned with."""


@dataclass(slots=True)
class Expanded:
    """Requests whose latents are expanded, as tables of tiles on the device."""

    expand_tiles: torch.Tensor
    attention_tiles: torch.Tensor
    num_latents: int


@dataclass(slots=True)
class TritonMLAMetadata(PagedAttentionMetadata):
    """One step. Which requests expand depends on the layer's widths: decided once for each."""

    plan: SharePlan | None
    """Of a step in which every request has one token; made in place, for captured graphs."""
    make_buffers: Callable[[int], SharePlan]
    """For as many requests."""
    host_starts: np.ndarray
    host_lens: np.ndarray
    _splits: dict[int, tuple[Absorbed | None, Expanded | None]] = field(default_factory=dict)

    def split(self, expand_from: int) -> tuple[Absorbed | None, Expanded | None]:
        """The tokens of requests with fewer new ones than ``expand_from``, and the others."""
        if expand_from not in self._splits and self.plan is not None:
            everything = self.query_start_loc, self.seq_lens, self.block_table, self.host_lens
            self._splits[expand_from] = Absorbed(None, self.plan, *everything), None
        if expand_from not in self._splits:
            counts = np.diff(self.host_starts)
            few = np.flatnonzero((counts > 0) & (counts < expand_from))
            many = np.flatnonzero(counts >= expand_from)
            self._splits[expand_from] = self._absorbed(few, counts), self._expanded(many, counts)
        return self._splits[expand_from]

    def _absorbed(self, requests: np.ndarray, counts: np.ndarray) -> Absorbed | None:
        if not requests.size:
            return None
        owners = np.repeat(requests, counts[requests])
        within = np.arange(owners.size) - np.repeat(
            np.cumsum(counts[requests]) - counts[requests], counts[requests]
        )
        rows = self.host_starts[owners] + within
        lens = self.host_lens[owners] - counts[owners] + within + 1
        packed = np.stack((rows, lens, owners, np.arange(owners.size))).astype(np.int64)
        device = self.block_table.device
        on_device = torch.from_numpy(packed).to(device, non_blocking=True)
        starts = torch.arange(owners.size + 1, dtype=torch.int32, device=device)
        seq_lens = on_device[1].int()
        plan = plan_shares(seq_lens, starts, self.make_buffers(owners.size))
        everything = owners.size == self.num_actual_tokens
        return Absorbed(
            rows=None if everything else on_device[0],
            plan=plan,
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_table=self.block_table[on_device[2]],
            host_lens=lens,
        )

    def _expanded(self, requests: np.ndarray, counts: np.ndarray) -> Expanded | None:
        if not requests.size:
            return None
        rows, lens = requests.tolist(), self.host_lens[requests].tolist()
        starts, new = self.host_starts[requests].tolist(), counts[requests].tolist()
        device = self.block_table.device
        to_expand = torch.from_numpy(expand_tiles(rows, lens))
        to_attend = torch.from_numpy(attention_tiles(rows, starts, new, lens))
        return Expanded(
            to_expand.to(device, non_blocking=True),
            to_attend.to(device, non_blocking=True),
            sum(lens),
        )


class TritonMLAMetadataBuilder(AttentionMetadataBuilder[TritonMLAMetadata]):
    """Plans a step of decodes into buffers that stay where they are."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model = vllm_config.model_config
        heads = model.get_num_attention_heads(vllm_config.parallel_config)
        self._make_buffers = partial(
            make_absorbed_buffers, num_heads=heads, dtype=model.dtype, device=device
        )
        self._buffers = self._make_buffers(vllm_config.scheduler_config.max_num_seqs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonMLAMetadata:
        common = common_attn_metadata
        plan = None
        if common.max_query_len == 1:
            plan = plan_shares(common.seq_lens, common.query_start_loc, self._buffers)
        return TritonMLAMetadata.of(
            common,
            plan=plan,
            make_buffers=self._make_buffers,
            host_starts=common.query_start_loc_cpu[: common.num_reqs + 1].numpy(),
            host_lens=common.seq_lens_cpu[: common.num_reqs].numpy(),
        )


class TritonMLAImpl(MLAImpl[TritonMLAMetadata]):
    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        store_latents(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query (T, Q, nope + rope) and latents (B, N, R + rope) -> output (T, Q, v)."""
        expand_from = max(2, tokens_worth_expanding(layer) // _EXPANDING_IS_CHEAPER_BY)
        absorbed, expanded = attn_metadata.split(expand_from)
        if absorbed is not None:
            if absorbed.rows is None:
                self.forward_mqa(layer, query, kv_cache, absorbed, output)
            else:
                part = query[absorbed.rows]
                result = output.new_empty((part.shape[0], *output.shape[1:]))
                self.forward_mqa(layer, part, kv_cache, absorbed, result)
                output.index_copy_(0, absorbed.rows, result)
        if expanded is not None:
            self.forward_mha(layer, query, kv_cache, attn_metadata.block_table, expanded, output)
        return output

    def forward_mqa(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: Absorbed,
        output: torch.Tensor,
    ) -> None:
        """Attend to latents; query (T, Q, nope + rope) -> output (T, Q, v)."""
        nope = layer.qk_nope_head_dim
        latent_query = layer.kv_b_proj.absorb_queries(query[..., :nope])
        sums = torch.empty_like(latent_query)
        absorbed_attention(
            latent_query.transpose(0, 1),
            query[..., nope:],
            kv_cache,
            sums.transpose(0, 1),
            step.plan,
            step.block_table,
            scale=self.scale,
        )
        output.copy_(layer.kv_b_proj.expand_values(sums).transpose(0, 1))

    def forward_mha(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        step: Expanded,
        output: torch.Tensor,
    ) -> None:
        """Attend to expanded keys and values; query (T, Q, nope + rope) -> output (T, Q, v)."""
        to_keys, to_values = layer.kv_b_proj.to_keys, layer.kv_b_proj.to_values
        assert isinstance(to_keys, torch.Tensor) and isinstance(to_values, torch.Tensor)
        widths = to_keys.shape[1], to_values.shape[1]
        size = step.num_latents * sum(widths) * query.dtype.itemsize
        at_once = min(layer.num_heads, max(1, _EXPANDED_BYTES // size))
        keys, values = (query.new_empty((step.num_latents, at_once * width)) for width in widths)
        for first in range(0, layer.num_heads, at_once):
            heads = slice(first, min(first + at_once, layer.num_heads))
            count = heads.stop - first
            parts = keys[:, : count * widths[0]], values[:, : count * widths[1]]
            for weight, part in zip((to_keys, to_values), parts, strict=True):
                expand_latents(kv_cache, weight[heads], part, block_table, step.expand_tiles)
            expanded_attention(
                query[:, heads],
                *parts,
                kv_cache,
                output[:, heads],
                block_table,
                step.attention_tiles,
                rank=layer.kv_lora_rank,
                scale=self.scale,
            )


class TritonMLABackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16", "float32"]
    forward_includes_kv_cache_update = False
    fits_cuda_graphs = True

    @staticmethod
    def get_name() -> str:
        return "TRITON_MLA"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return TritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type[TritonMLAMetadataBuilder]:
        return TritonMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(8, 577, 8))

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted)
        if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
            reasons.append("needs a CUDA device (or TRITON_INTERPRET=1)")
        cache_dtype = wanted.get("kv_cache_dtype") or "auto"
        if cache_dtype not in ("auto", str(wanted["dtype"]).removeprefix("torch.")):
            reasons.append(f"a {cache_dtype} cache needs a model of that dtype")
        return reasons
