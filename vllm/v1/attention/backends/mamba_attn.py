"""STATE: the backend of layers that keep recurrent states, and what they need to know of a step.

It says which block holds the state that each request continues and which blocks take the states
after this step. Owns no computation: the layers call the operators in ``vllm._state_ops``, which
take every address from the strides of the views that the layers bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm._state_ops import StateSegments
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.ops.triton_state_blocks import StateBlocks

__all__ = ["StateAttentionBackend", "StateMetadata", "StateMetadataBuilder"]


@dataclass(slots=True)
class StateMetadata(AttentionMetadata):
    """One step of a group of state layers. R requests, T tokens, S segments."""

    segments: StateSegments
    num_reqs: int
    num_actual_tokens: int
    query_start_loc: torch.Tensor
    """(R + 1,) int32."""

    @property
    def has_initial_state(self) -> torch.Tensor:
        """(R,) bool: the request continues a state that lies in the cache."""
        return self.segments.sources >= 0


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Finds the blocks of states by ``MambaSpec.state_column``, the scheduler's own rule.

    Modes "none" and "align": one state is kept, after the request's last token of the step. Mode
    "all": the state at the end of each block is kept too, so a chunk is cut at block boundaries.
    """

    kv_cache_spec: MambaSpec

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._found: StateBlocks | None = None
        if device.type == "cuda":
            from vllm.v1.attention.ops.triton_state_blocks import StateBlocks

            self._found = StateBlocks(vllm_config.scheduler_config.max_num_seqs, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StateMetadata:
        common, spec = common_attn_metadata, self.kv_cache_spec
        table = common.block_table_tensor
        before = common.num_computed_tokens_cpu
        # With a token each, every segment ends where its request does, whatever is kept.
        if self._found is not None and (
            spec.mamba_cache_mode != "all" or common.max_query_len == 1
        ):
            segments = self._found.find(
                common.query_start_loc,
                common.seq_lens,
                table,
                0 if spec.mamba_cache_mode == "none" else spec.block_size,
                common.num_actual_tokens,
            )
        elif spec.mamba_cache_mode == "all":
            segments = self._cut_at_blocks(common, before)
        else:
            if spec.mamba_cache_mode == "none":
                sources = targets = table[:, 0]
            else:
                rows = torch.arange(common.num_reqs, device=table.device)
                sources = table[rows, self._column(before, table.device)]
                targets = table[rows, self._column(common.seq_lens_cpu, table.device)]
            segments = StateSegments(
                token_starts=common.query_start_loc,
                request_starts=torch.arange(
                    common.num_reqs + 1, dtype=torch.int32, device=table.device
                ),
                sources=self._known(sources, before),
                targets=targets.contiguous(),
                num_tokens=common.num_actual_tokens,
                num_requests=common.num_reqs,
            )
        return StateMetadata(
            segments=segments,
            num_reqs=common.num_reqs,
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
        )

    def _column(self, num_tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Positions in the rows of the table of the states after these many tokens."""
        size = self.kv_cache_spec.block_size
        columns = ((num_tokens.long() + (size - 1)) // size - 1).clamp_(min=0)
        return columns.to(device, non_blocking=True)

    @staticmethod
    def _known(sources: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        continues = (before > 0).to(sources.device, non_blocking=True)
        return torch.where(continues, sources, -1)

    def _cut_at_blocks(
        self, common: CommonAttentionMetadata, before: torch.Tensor
    ) -> StateSegments:
        size, device = self.kv_cache_spec.block_size, common.block_table_tensor.device
        before, after = before.long(), common.seq_lens_cpu.long()
        first, last = before // size, (after - 1) // size
        counts = last - first + 1
        request_starts = torch.zeros(common.num_reqs + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=request_starts[1:])
        requests = torch.repeat_interleave(torch.arange(common.num_reqs), counts)
        columns = first[requests] + torch.arange(len(requests)) - request_starts[requests]
        ends = torch.minimum((columns + 1) * size, after[requests])
        token_starts = torch.zeros(len(requests) + 1, dtype=torch.int64)
        starts = common.query_start_loc_cpu.long()
        token_starts[1:] = starts[requests] + ends - before[requests]
        table = common.block_table_tensor
        rows = torch.arange(common.num_reqs, device=device)
        return StateSegments(
            token_starts=token_starts.to(device, torch.int32, non_blocking=True),
            request_starts=request_starts.to(device, torch.int32, non_blocking=True),
            sources=self._known(table[rows, self._column(before, device)], before),
            targets=table[requests.to(device), columns.to(device)],
            num_tokens=common.num_actual_tokens,
            num_requests=common.num_reqs,
        )


class StateAttentionBackend(AttentionBackend):
    """Any layout, page and padding: states are found by strides."""

    fits_cuda_graphs = True

    @staticmethod
    def get_name() -> str:
        return "STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        raise TypeError("a layer with a recurrent state computes for itself, it has no impl")

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def is_ssm(cls) -> bool:
        return True
