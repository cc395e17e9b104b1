"""Which blocks hold the states that requests continue and leave, found on the device.

The rule is that of ``MambaSpec.state_column``. What comes out lies in buffers that stay where they
are, so that a captured step reads it; the host has to know nothing but the number of requests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm._torch_state_ops import StateSegments

__all__ = ["StateBlocks"]

_REQUESTS = 128


@triton.jit(do_not_specialize=["requests", "block_size"])
def _state_blocks_kernel(
    query_start_ptr, seq_lens_ptr, table_ptr, sources_ptr, targets_ptr, requests, block_size,
    stride_table, REQUESTS: tl.constexpr,
):  # fmt: skip
    """A request of no length is not there: it has neither source nor target."""
    request = tl.program_id(0) * REQUESTS + tl.arange(0, REQUESTS)
    valid = request < requests
    start = tl.load(query_start_ptr + request, mask=valid, other=0)
    end = tl.load(query_start_ptr + request + 1, mask=valid, other=0)
    after = tl.load(seq_lens_ptr + request, mask=valid, other=0)
    before = after - (end - start)
    # A block size of 0: one state, in the first column.
    size = tl.maximum(block_size, 1)
    come_from = tl.where(block_size > 0, tl.maximum((before + size - 1) // size - 1, 0), 0)
    go_to = tl.where(block_size > 0, tl.maximum((after + size - 1) // size - 1, 0), 0)
    row = table_ptr + request.to(tl.int64) * stride_table
    source = tl.load(row + come_from, mask=valid & (before > 0), other=-1)
    target = tl.load(row + go_to, mask=valid & (after > 0), other=-1)
    tl.store(sources_ptr + request, source, mask=valid)
    tl.store(targets_ptr + request, target, mask=valid)


class StateBlocks:
    """Sources and targets of up to ``max_requests`` requests, one segment each."""

    def __init__(self, max_requests: int, device: torch.device) -> None:
        self._sources, self._targets = torch.full(
            (2, max_requests), -1, dtype=torch.int32, device=device
        ).unbind(0)
        self._starts = torch.arange(max_requests + 1, dtype=torch.int32, device=device)

    def find(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        num_tokens: int,
    ) -> StateSegments:
        """Segments of a step, valid until the next call.

        Args:
            query_start_loc: int32 ``(R + 1,)``; seq_lens: int32 ``(R,)``, this step's tokens
                included.
            block_table: int32 ``(R, columns)``, dense rows.
            block_size: tokens between states; 0 where a request has one state for good.
        """
        requests = seq_lens.shape[0]
        assert block_table.stride(1) == 1
        _state_blocks_kernel[(triton.cdiv(requests, _REQUESTS),)](
            query_start_loc, seq_lens, block_table, self._sources, self._targets, requests,
            block_size, block_table.stride(0), REQUESTS=_REQUESTS, num_warps=4,
        )  # fmt: skip
        return StateSegments(
            token_starts=query_start_loc,
            request_starts=self._starts[: requests + 1],
            sources=self._sources[:requests],
            targets=self._targets[:requests],
            num_tokens=num_tokens,
            num_requests=requests,
        )
