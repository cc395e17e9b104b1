"""From the batch and a step's token counts to the device's inputs: one upload, two small kernels.

The host sends what it alone knows (counts, new ids, new blocks, how to sample); positions, slots
and lengths are made on the device, in buffers that stay where they are so that captured graphs
read them.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
import triton

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.ops.random import uniform
from vllm.v1.worker.device import DeviceLayer
from vllm.v1.worker.gpu.block_table import DeviceBlockTable
from vllm.v1.worker.gpu.device import PackedUpload
from vllm.v1.worker.gpu.input_batch import DeviceInputBatch
from vllm.v1.worker.gpu.kernels import apply_table_changes, prepare_inputs
from vllm.v1.worker.input_batch import InputBatch
from vllm.v1.worker.input_preparation import InputPreparer, StepInputs

__all__ = ["DeviceInputPreparer", "DeviceStepInputs", "DrawInputs", "graph_size"]

_TOKENS_PER_PROGRAM = 256
_CHANGES_PER_PROGRAM = 1024
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@dataclass(slots=True)
class DrawInputs:
    """For ``sample_rows``, and ``truncate_rows`` where some row has limits; on the device.

    ``scales`` and ``uniforms`` are float32 ``(S,)``; ``limits`` are top-k (int32), top-p and
    min-p (float32), ``(S,)`` each.
    """

    scales: torch.Tensor
    uniforms: torch.Tensor
    limits: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


@dataclass(slots=True)
class DeviceStepInputs(StepInputs):
    """``StepInputs`` for the device.

    Attributes:
        graph_size: requests of the captured graph that runs the step, a decode; 0 where none does.
            The device's tensors are then that long, and every request has one token.
        prompt_graph_size: tokens of the captured graph that runs the step with prompts, or 0.
        draw: how to sample, where no row asks for more than the device's draw can do; of all
            rows of the batch with a graph, else of ``sample_rows``.
        device_logits_indices: int32 ``(S,)`` on the device; None where a graph runs the step.
    """

    graph_size: int
    prompt_graph_size: int
    draw: DrawInputs | None
    device_logits_indices: torch.Tensor | None


def graph_size(num_reqs: int, largest: int) -> int:
    """Requests of the smallest graph for ``num_reqs``: 1, 2, 4, then multiples of 8; 0 for none."""
    if num_reqs > largest:
        return 0
    size = 1 << (num_reqs - 1).bit_length() if num_reqs <= 4 else -(-num_reqs // 8) * 8
    return min(size, largest)


class DeviceInputPreparer(InputPreparer):
    """Makes a step's inputs; what it returns is valid until the next call.

    ``largest_graph`` (requests) and ``prompt_graph_sizes`` (tokens, ascending) are set once graphs
    are captured. ``sampled`` int64 ``(max_num_reqs,)`` is
    where a step leaves its samples, and where the next one finds them.
    """

    def __init__(
        self, max_num_tokens: int, max_num_reqs: int, num_groups: int, device: DeviceLayer
    ) -> None:
        on = device.device
        self._arange = np.arange(max(max_num_tokens, max_num_reqs) + 1, dtype=np.int64)
        self._upload = PackedUpload(1 << 16, on)
        self.input_ids = torch.zeros(max_num_tokens, dtype=torch.int64, device=on)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=on)
        self._device_starts = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=on)
        self._device_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=on)
        self._slot_mappings = [
            torch.zeros(max_num_tokens, dtype=torch.int64, device=on) for _ in range(num_groups)
        ]
        self._graph_draw = DrawInputs(
            torch.zeros(max_num_reqs, dtype=torch.float32, device=on),
            torch.zeros(max_num_reqs, dtype=torch.float32, device=on),
        )
        self.sampled = torch.zeros(max_num_reqs, dtype=torch.int64, device=on)
        self._host_starts = torch.arange(max_num_reqs + 1, dtype=torch.int32)
        self.largest_graph = 0
        self.prompt_graph_sizes: list[int] = []

    def graph_draw(self, size: int) -> DrawInputs:
        """What a graph of ``size`` requests samples by."""
        return DrawInputs(self._graph_draw.scales[:size], self._graph_draw.uniforms[:size])

    def prepare(self, batch: InputBatch, num_scheduled: np.ndarray) -> DeviceStepInputs:
        assert isinstance(batch, DeviceInputBatch)
        num_reqs = batch.num_reqs
        ends = np.cumsum(num_scheduled)
        num_tokens = int(ends[-1])
        starts = ends - num_scheduled
        computed = batch.num_computed[:num_reqs]
        seq_lens = computed + num_scheduled
        sample_rows = np.flatnonzero(seq_lens == batch.num_tokens[:num_reqs])
        logits_indices = ends[sample_rows] - 1

        is_decode = num_tokens == num_reqs
        size = graph_size(num_reqs, self.largest_graph) if is_decode else 0
        prompt_size = 0 if is_decode else self._prompt_graph_size(num_tokens)
        if is_decode:
            ids = batch.token_ids[self._arange[:num_reqs], computed]
        else:
            rows = np.repeat(self._arange[:num_reqs], num_scheduled)
            ids = batch.token_ids[rows, self._arange[:num_tokens] - (starts - computed)[rows]]
        tables = _tables_of(batch)
        changes = [table.take_changes() for table in tables]
        draw_rows = None
        if batch.draws_on_device:
            draw_rows = self._arange[:num_reqs] if size else sample_rows

        upload = self._upload
        upload.begin(8 * num_reqs + num_tokens + 2 * sum(places.size for places, _ in changes) + 1)
        starts_at = upload.put(np.concatenate(([0], ends)).astype(np.int32))
        computed_at = upload.put(computed.astype(np.int32))
        ids_at = upload.put(ids)
        changes_at = [(upload.put(places), upload.put(values)) for places, values in changes]
        indices_at = 0 if size else upload.put(logits_indices.astype(np.int32))
        scales_at = uniforms_at = 0
        limits_at = None
        if draw_rows is not None:
            numbers = uniform(batch.seeds[draw_rows], batch.num_tokens[draw_rows])
            scales_at = upload.put(batch.scales(draw_rows))
            uniforms_at = upload.put(np.minimum(numbers.astype(np.float32), _BELOW_ONE))
            limits_at = (
                (
                    upload.put(batch.top_k[draw_rows].astype(np.int32)),
                    upload.put(batch.top_p[draw_rows]),
                    upload.put(batch.min_p[draw_rows]),
                )
                if batch.limits_draws
                else None
            )
        upload.send()

        for table, (places, _), (places_at, values_at) in zip(
            tables, changes, changes_at, strict=True
        ):
            if places.size:
                apply_table_changes[(triton.cdiv(places.size, _CHANGES_PER_PROGRAM),)](
                    upload.device_words,
                    table.device_table,
                    places_at,
                    values_at,
                    places.size,
                    BLOCK=_CHANGES_PER_PROGRAM,
                )
        padded, padded_tokens = size or num_reqs, size or num_tokens
        longest = max_query_len = 1 if is_decode else int(num_scheduled.max())
        rows_of_programs = padded
        if prompt_size:
            padded, padded_tokens = self._requests_of_graph(prompt_size), prompt_size
            max_query_len = prompt_size
            longest = max(longest, prompt_size - num_tokens)
            rows_of_programs = padded + 1
        grid = (rows_of_programs, triton.cdiv(longest, _TOKENS_PER_PROGRAM))
        for group, table in enumerate(tables):
            prepare_inputs[grid](
                upload.device_words,
                upload.device_words.view(torch.float32),
                self.sampled,
                table.device_table,
                table.device_table.stride(0),
                table.kernel_block_size,
                self.input_ids,
                self.positions,
                self._device_starts,
                self._device_lens,
                self._slot_mappings[group],
                self._graph_draw.scales,
                self._graph_draw.uniforms,
                starts_at,
                computed_at,
                ids_at,
                scales_at,
                uniforms_at,
                num_reqs,
                num_tokens,
                padded_tokens,
                FIRST_GROUP=group == 0,
                COPIES_SAMPLING=bool(size) and draw_rows is not None,
                HAS_PROMPTS=prompt_size > 0,
                BLOCK=_TOKENS_PER_PROGRAM,
                num_warps=2,
            )
        draw = None
        if draw_rows is not None:
            count = draw_rows.size
            draw = DrawInputs(upload.floats(scales_at, count), upload.floats(uniforms_at, count))
            if limits_at is not None:
                draw.limits = (
                    upload.words(limits_at[0], count),
                    upload.floats(limits_at[1], count),
                    upload.floats(limits_at[2], count),
                )
        return DeviceStepInputs(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            num_scheduled=num_scheduled,
            input_ids=self.input_ids[: size or num_tokens],
            positions=self.positions[: size or num_tokens],
            starts=starts,
            sample_rows=sample_rows,
            logits_indices=logits_indices,
            attention=self._attention(
                tables,
                padded,
                padded_tokens,
                max_query_len,
                ends,
                seq_lens,
                computed,
                is_captured=bool(size or prompt_size),
            ),
            graph_size=size,
            prompt_graph_size=prompt_size,
            draw=draw,
            device_logits_indices=None if size else upload.words(indices_at, logits_indices.size),
        )

    def _attention(
        self,
        tables: list[DeviceBlockTable],
        num_reqs: int,
        num_tokens: int,
        max_query_len: int,
        ends: np.ndarray,
        seq_lens: np.ndarray,
        computed: np.ndarray,
        *,
        is_captured: bool,
    ) -> list[CommonAttentionMetadata]:
        """Metadata of ``num_reqs`` requests, those that fill a graph up included; the arrays are
        of those that are there.
        """
        if max_query_len == 1:
            host_starts = self._host_starts[: num_reqs + 1]
        else:
            starts = np.full(num_reqs + 1, ends[-1], dtype=np.int32)
            starts[0] = 0
            starts[1 : ends.size + 1] = ends
            host_starts = torch.from_numpy(starts)
        host_lens, host_computed = (self._padded(array, num_reqs) for array in (seq_lens, computed))
        return [
            CommonAttentionMetadata(
                query_start_loc=self._device_starts[: num_reqs + 1],
                query_start_loc_cpu=host_starts,
                seq_lens=self._device_lens[:num_reqs],
                seq_lens_cpu=host_lens,
                num_computed_tokens_cpu=host_computed,
                num_reqs=num_reqs,
                num_actual_tokens=num_tokens,
                max_query_len=max_query_len,
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=table.device_view(num_reqs),
                slot_mapping=slots[:num_tokens],
                is_captured=is_captured,
            )
            for table, slots in zip(tables, self._slot_mappings, strict=True)
        ]

    def _padded(self, array: np.ndarray, size: int) -> torch.Tensor:
        values = np.zeros(size, dtype=np.int32)
        values[: array.size] = array
        return torch.from_numpy(values)

    def capture_metadata(self, batch: InputBatch, size: int) -> list[CommonAttentionMetadata]:
        """Metadata of a decode of ``size`` requests, none of which is there."""
        self._device_starts[: size + 1].copy_(self._host_starts[: size + 1])
        return self._metadata_of_nothing(batch, size, size, 1)

    def capture_prompt_metadata(
        self, batch: InputBatch, size: int
    ) -> list[CommonAttentionMetadata]:
        """Metadata of a step of ``size`` tokens, none of which is there."""
        requests = self._requests_of_graph(size)
        self._device_starts[: requests + 1].zero_()
        return self._metadata_of_nothing(batch, requests, size, size)

    def _metadata_of_nothing(
        self, batch: InputBatch, num_reqs: int, num_tokens: int, max_query_len: int
    ) -> list[CommonAttentionMetadata]:
        self._device_lens[:num_reqs].zero_()
        self.input_ids[:num_tokens].zero_()
        self.positions[:num_tokens].zero_()
        for slots in self._slot_mappings:
            slots[:num_tokens].fill_(-1)
        nothing = np.zeros(num_reqs, dtype=np.int64)
        return self._attention(
            _tables_of(batch), num_reqs, num_tokens, max_query_len, nothing, nothing + 1, nothing,
            is_captured=True,
        )  # fmt: skip

    def _prompt_graph_size(self, num_tokens: int) -> int:
        """Tokens of the smallest graph for ``num_tokens``; 0 for none."""
        at = bisect.bisect_left(self.prompt_graph_sizes, num_tokens)
        return self.prompt_graph_sizes[at] if at < len(self.prompt_graph_sizes) else 0

    def _requests_of_graph(self, num_tokens: int) -> int:
        return min(num_tokens, self._device_lens.shape[0])


def _tables_of(batch: InputBatch) -> list[DeviceBlockTable]:
    return [table for table in batch.block_table.tables if isinstance(table, DeviceBlockTable)]
