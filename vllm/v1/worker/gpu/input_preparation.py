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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """How large a step is on the device, with what fills a graph up.

    ``grid`` is that of ``prepare_inputs``, of no use where nothing is prepared.
    """

    num_reqs: int
    num_tokens: int
    max_query_len: int
    grid: tuple[int, int] = (0, 0)
    graph_size: int = 0
    prompt_graph_size: int = 0


@dataclass(slots=True)
class _DrawPlaces:
    """Where the upload has what ``DrawInputs`` shows."""

    scales: int = 0
    uniforms: int = 0
    limits: tuple[int, int, int] | None = None


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
        extent = self._extent_of(num_scheduled, num_tokens)
        size = extent.graph_size
        if num_tokens == num_reqs:
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
        draw_at = _DrawPlaces() if draw_rows is None else self._put_draw(batch, draw_rows)
        upload.send()

        for table, (places, _), at in zip(tables, changes, changes_at, strict=True):
            if places.size:
                apply_table_changes[(triton.cdiv(places.size, _CHANGES_PER_PROGRAM),)](
                    upload.device_words, table.device_table, *at, places.size,
                    BLOCK=_CHANGES_PER_PROGRAM,
                )  # fmt: skip
        for group, table in enumerate(tables):
            prepare_inputs[extent.grid](
                upload.device_words, upload.device_words.view(torch.float32), self.sampled,
                table.device_table, table.device_table.stride(0), table.kernel_block_size,
                self.input_ids, self.positions, self._device_starts, self._device_lens,
                self._slot_mappings[group], self._graph_draw.scales, self._graph_draw.uniforms,
                starts_at, computed_at, ids_at, draw_at.scales, draw_at.uniforms, num_reqs,
                num_tokens, extent.num_tokens, FIRST_GROUP=group == 0,
                COPIES_SAMPLING=bool(size) and draw_rows is not None,
                HAS_PROMPTS=extent.prompt_graph_size > 0, BLOCK=_TOKENS_PER_PROGRAM, num_warps=2,
            )  # fmt: skip
        return DeviceStepInputs(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            num_scheduled=num_scheduled,
            input_ids=self.input_ids[: size or num_tokens],
            positions=self.positions[: size or num_tokens],
            starts=starts,
            sample_rows=sample_rows,
            logits_indices=logits_indices,
            attention=self._attention(tables, extent, ends, seq_lens, computed),
            graph_size=size,
            prompt_graph_size=extent.prompt_graph_size,
            draw=None if draw_rows is None else self._draw_inputs(draw_at, draw_rows.size),
            device_logits_indices=None if size else upload.words(indices_at, logits_indices.size),
        )

    def _extent_of(self, num_scheduled: np.ndarray, num_tokens: int) -> _Extent:
        num_reqs = num_scheduled.size
        if num_tokens == num_reqs:
            size = graph_size(num_reqs, self.largest_graph)
            padded = size or num_reqs
            return _Extent(
                num_reqs=padded, num_tokens=padded, max_query_len=1, grid=(padded, 1),
                graph_size=size,
            )  # fmt: skip
        longest = int(num_scheduled.max())
        at = bisect.bisect_left(self.prompt_graph_sizes, num_tokens)
        if at == len(self.prompt_graph_sizes):
            return _Extent(
                num_reqs=num_reqs, num_tokens=num_tokens, max_query_len=longest,
                grid=(num_reqs, triton.cdiv(longest, _TOKENS_PER_PROGRAM)),
            )  # fmt: skip
        size = self.prompt_graph_sizes[at]
        padded, longest = self._requests_of_graph(size), max(longest, size - num_tokens)
        return _Extent(
            num_reqs=padded, num_tokens=size, max_query_len=size,
            # One row of programs is no request's, and fills the graph up.
            grid=(padded + 1, triton.cdiv(longest, _TOKENS_PER_PROGRAM)), prompt_graph_size=size,
        )  # fmt: skip

    def _requests_of_graph(self, num_tokens: int) -> int:
        return min(num_tokens, self._device_lens.shape[0])

    def _put_draw(self, batch: DeviceInputBatch, rows: np.ndarray) -> _DrawPlaces:
        upload = self._upload
        numbers = uniform(batch.seeds[rows], batch.num_tokens[rows])
        places = _DrawPlaces(
            upload.put(batch.scales(rows)),
            upload.put(np.minimum(numbers.astype(np.float32), _BELOW_ONE)),
        )
        if batch.limits_draws:
            places.limits = (
                upload.put(batch.top_k[rows].astype(np.int32)),
                upload.put(batch.top_p[rows]),
                upload.put(batch.min_p[rows]),
            )
        return places

    def _draw_inputs(self, places: _DrawPlaces, count: int) -> DrawInputs:
        words, floats = self._upload.words, self._upload.floats
        draw = DrawInputs(floats(places.scales, count), floats(places.uniforms, count))
        if places.limits is not None:
            top_k, top_p, min_p = places.limits
            draw.limits = words(top_k, count), floats(top_p, count), floats(min_p, count)
        return draw

    def _attention(
        self,
        tables: list[DeviceBlockTable],
        extent: _Extent,
        ends: np.ndarray,
        seq_lens: np.ndarray,
        computed: np.ndarray,
    ) -> list[CommonAttentionMetadata]:
        """Metadata of all that ``extent`` has; the arrays are of the requests that are there."""
        num_reqs = extent.num_reqs
        if extent.max_query_len == 1:
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
                num_actual_tokens=extent.num_tokens,
                max_query_len=extent.max_query_len,
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=table.device_view(num_reqs),
                slot_mapping=slots[: extent.num_tokens],
                is_captured=bool(extent.graph_size or extent.prompt_graph_size),
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
        extent = _Extent(num_reqs=size, num_tokens=size, max_query_len=1, graph_size=size)
        return self._metadata_of_nothing(batch, extent)

    def capture_prompt_metadata(
        self, batch: InputBatch, size: int
    ) -> list[CommonAttentionMetadata]:
        """Metadata of a step of ``size`` tokens, none of which is there."""
        requests = self._requests_of_graph(size)
        self._device_starts[: requests + 1].zero_()
        extent = _Extent(
            num_reqs=requests, num_tokens=size, max_query_len=size, prompt_graph_size=size
        )
        return self._metadata_of_nothing(batch, extent)

    def _metadata_of_nothing(
        self, batch: InputBatch, extent: _Extent
    ) -> list[CommonAttentionMetadata]:
        self._device_lens[: extent.num_reqs].zero_()
        self.input_ids[: extent.num_tokens].zero_()
        self.positions[: extent.num_tokens].zero_()
        for slots in self._slot_mappings:
            slots[: extent.num_tokens].fill_(-1)
        nothing = np.zeros(extent.num_reqs, dtype=np.int64)
        return self._attention(_tables_of(batch), extent, nothing, nothing + 1, nothing)


def _tables_of(batch: InputBatch) -> list[DeviceBlockTable]:
    return [table for table in batch.block_table.tables if isinstance(table, DeviceBlockTable)]
