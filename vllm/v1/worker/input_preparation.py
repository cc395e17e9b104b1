"""From the batch and a step's token counts to the tensors of one forward pass.

Whole-array work only: nothing here loops over tokens or requests. Owns the buffers that the
device reads; knows nothing of models or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.device import DeviceLayer
from vllm.v1.worker.input_batch import InputBatch

__all__ = ["InputPreparer", "StepInputs"]


@dataclass(slots=True)
class StepInputs:
    """One step's inputs. R requests in batch order, T tokens, request by request.

    Attributes:
        num_scheduled: int64 ``(R,)`` tokens of each request in this step.
        input_ids: int64 ``(T,)`` on the device.
        positions: int64 ``(T,)`` on the device.
        starts: int64 ``(R,)``, index of each request's first token.
        sample_rows: int64 ``(S,)`` batch rows whose last known token is computed in this step.
        logits_indices: int64 ``(S,)``, the tokens whose hidden states they sample from.
        attention: one per KV-cache group.
    """

    num_reqs: int
    num_tokens: int
    num_scheduled: np.ndarray
    input_ids: torch.Tensor
    positions: torch.Tensor
    starts: np.ndarray
    sample_rows: np.ndarray
    logits_indices: np.ndarray
    attention: list[CommonAttentionMetadata]


class InputPreparer:
    """Makes a step's inputs, in buffers that it keeps.

    Args:
        max_num_tokens: T at most.
        max_num_reqs: R at most.
        num_groups: KV-cache groups.
    """

    def __init__(
        self, max_num_tokens: int, max_num_reqs: int, num_groups: int, device: DeviceLayer
    ) -> None:
        self._arange = np.arange(max(max_num_tokens, max_num_reqs) + 1, dtype=np.int64)
        self._input_ids = device.make_buffer((max_num_tokens,), torch.int64)
        self._positions = device.make_buffer((max_num_tokens,), torch.int64)
        self._query_start_loc = device.make_buffer((max_num_reqs + 1,), torch.int32)
        self._seq_lens = device.make_buffer((max_num_reqs,), torch.int32)
        self._num_computed = device.make_buffer((max_num_reqs,), torch.int32)
        self._slots = [
            device.make_buffer((max_num_tokens,), torch.int64) for _ in range(num_groups)
        ]

    def prepare(self, batch: InputBatch, num_scheduled: np.ndarray) -> StepInputs:
        """The inputs of a step that computes ``num_scheduled`` (int64 ``(R,)``, each at least 1,
        in batch order) tokens of each request. They are valid until the next call.
        """
        num_reqs = batch.num_reqs
        computed = batch.num_computed[:num_reqs]
        seq_lens = computed + num_scheduled
        num_tokens = int(num_scheduled.sum())
        positions = self._positions.np[:num_tokens]
        if num_tokens == num_reqs:
            starts = rows = self._arange[:num_reqs]
            ends = self._arange[1 : num_reqs + 1]
            positions[:] = computed
            max_query_len = 1
        else:
            ends = np.cumsum(num_scheduled)
            starts = ends - num_scheduled
            rows = np.repeat(self._arange[:num_reqs], num_scheduled)
            np.subtract(self._arange[:num_tokens], (starts - computed)[rows], out=positions)
            max_query_len = int(num_scheduled.max())
        self._input_ids.np[:num_tokens] = batch.tokens_at(rows, positions)

        self._query_start_loc.np[1 : num_reqs + 1] = ends
        self._seq_lens.np[:num_reqs] = seq_lens
        self._num_computed.np[:num_reqs] = computed
        max_seq_len = int(seq_lens.max())
        attention = []
        for table, slots in zip(batch.block_table.tables, self._slots, strict=True):
            table.slot_mapping(rows, positions, slots.np[:num_tokens])
            attention.append(
                CommonAttentionMetadata(
                    query_start_loc=self._query_start_loc.device_view(num_reqs + 1),
                    query_start_loc_cpu=self._query_start_loc.host_view(num_reqs + 1),
                    seq_lens=self._seq_lens.device_view(num_reqs),
                    seq_lens_cpu=self._seq_lens.host_view(num_reqs),
                    num_computed_tokens_cpu=self._num_computed.host_view(num_reqs),
                    num_reqs=num_reqs,
                    num_actual_tokens=num_tokens,
                    max_query_len=max_query_len,
                    max_seq_len=max_seq_len,
                    block_table_tensor=table.device_view(num_reqs),
                    slot_mapping=slots.device_view(num_tokens),
                )
            )
        (sample_rows,) = (seq_lens == batch.num_tokens[:num_reqs]).nonzero()
        return StepInputs(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            num_scheduled=num_scheduled,
            input_ids=self._input_ids.device_view(num_tokens),
            positions=self._positions.device_view(num_tokens),
            starts=starts,
            sample_rows=sample_rows,
            logits_indices=ends[sample_rows] - 1,
            attention=attention,
        )
