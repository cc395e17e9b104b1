"""A step's tensors are what a loop over its tokens would make."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import by_effort
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.block_table import BlockTable, MultiGroupBlockTable
from vllm.v1.worker.device import CPUDeviceLayer
from vllm.v1.worker.gpu.block_table import DeviceBlockTable
from vllm.v1.worker.gpu.device import CUDADeviceLayer
from vllm.v1.worker.gpu.input_batch import DeviceInputBatch
from vllm.v1.worker.gpu.input_preparation import DeviceInputPreparer, DeviceStepInputs
from vllm.v1.worker.input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.input_preparation import InputPreparer

BLOCK = 16


def make_batch(lengths: list[tuple[int, int, int]]) -> InputBatch:
    """One request per (prompt tokens, output tokens, computed tokens)."""
    device = CPUDeviceLayer()
    tables = MultiGroupBlockTable([BlockTable(BLOCK, BLOCK, 8, 8, device)])
    batch = InputBatch(8, 128, 1_000, tables)
    for i, (num_prompt, num_output, computed) in enumerate(lengths):
        state = CachedRequestState(
            req_id=str(i),
            prompt_token_ids=[100 * i + t for t in range(num_prompt)],
            sampling_params=SamplingParams(),
            block_ids=([10 * i + b for b in range(8)],),
            num_computed_tokens=computed,
            seed=0,
            output_token_ids=[500 + t for t in range(num_output)],
        )
        batch.add(state)
    return batch


@pytest.mark.parametrize(
    ("lengths", "scheduled"),
    [
        ([(20, 0, 0)], [20]),
        ([(20, 3, 22), (5, 1, 5), (40, 9, 48)], [1, 1, 1]),
        ([(20, 3, 22), (40, 0, 8), (7, 0, 0)], [1, 30, 7]),
        ([(40, 0, 0), (40, 0, 16), (9, 4, 0)], [17, 24, 13]),
    ],
)
def test_inputs(lengths, scheduled):
    batch = make_batch(lengths)
    step = InputPreparer(128, 8, 1, CPUDeviceLayer()).prepare(batch, np.array(scheduled))
    ids, positions, slots, seq_lens, ends, samples = [], [], [], [], [0], []
    for row, ((num_prompt, num_output, computed), count) in enumerate(
        zip(lengths, scheduled, strict=True)
    ):
        for position in range(computed, computed + count):
            token = 100 * row + position if position < num_prompt else 500 + position - num_prompt
            ids.append(token)
            positions.append(position)
            slots.append((10 * row + position // BLOCK) * BLOCK + position % BLOCK)
        seq_lens.append(computed + count)
        ends.append(ends[-1] + count)
        if computed + count == num_prompt + num_output:
            samples.append(row)
    (common,) = step.attention
    assert step.input_ids.tolist() == ids
    assert step.positions.tolist() == positions
    assert common.slot_mapping.tolist() == slots
    assert common.seq_lens.tolist() == seq_lens
    assert common.query_start_loc.tolist() == ends
    assert common.num_computed_tokens_cpu.tolist() == [c for _, _, c in lengths]
    assert (common.max_query_len, common.max_seq_len) == (max(scheduled), max(seq_lens))
    assert (common.num_reqs, common.num_actual_tokens) == (len(lengths), sum(scheduled))
    assert step.sample_rows.tolist() == samples
    assert step.logits_indices.tolist() == [ends[row + 1] - 1 for row in samples]


def test_rows_stay_dense_when_requests_leave():
    batch = make_batch([(5, 0, 0), (6, 0, 0), (7, 0, 0), (8, 1, 8), (9, 0, 3)])
    empty = [batch.remove("0"), batch.remove("3")]
    batch.condense(empty)
    assert sorted(batch.req_ids) == ["1", "2", "4"]
    for req_id, row in batch.req_id_to_index.items():
        assert batch.req_ids[row] == req_id
        length = {"1": 6, "2": 7, "4": 9}[req_id]
        assert batch.num_tokens[row] == length
        assert batch.token_ids[row, :length].tolist() == [
            100 * int(req_id) + t for t in range(length)
        ]
        assert batch.block_table[0].array[row, 0] == 10 * int(req_id)
    assert batch.num_computed[batch.req_id_to_index["4"]] == 3


def test_a_new_request_takes_an_empty_row():
    batch = make_batch([(5, 0, 0), (6, 0, 0)])
    row = batch.remove("0")
    state = CachedRequestState("n", [1, 2], SamplingParams(temperature=0), ([3],), 0, 0)
    batch.replace(row, state)
    assert batch.req_ids == ["n", "1"]
    assert batch.token_ids[0, :2].tolist() == [1, 2]
    assert batch.block_table[0].num_blocks[0] == 1


MAX_LEN, MAX_TOKENS, UNTOUCHED = 320, 400, -77


@st.composite
def steps_with_prompts(draw):
    """(prompt tokens, output tokens, computed tokens, tokens of the step) of some requests."""
    requests = []
    for i in range(draw(st.integers(1, 4))):
        num_prompt = draw(st.integers(1, 20) if i else st.integers(2, 290))
        num_output = draw(st.integers(0, 9))
        known = num_prompt + num_output
        computed = draw(st.integers(0, known - (2 if i == 0 else 1)))
        left = known - computed
        count = draw(st.sampled_from([left, 1 if i else 2]))
        requests.append((num_prompt, num_output, computed, count))
    return requests


def prepare_on_device(requests, max_num_reqs: int, graphs: list[int]) -> DeviceStepInputs:
    """By kernels, in buffers full of something else, after a step that has left samples."""
    device = CUDADeviceLayer(torch.device("cpu"))
    tables = MultiGroupBlockTable(
        [DeviceBlockTable(size, 16, max_num_reqs, MAX_LEN // size, device) for size in (16, 32)]
    )
    batch = DeviceInputBatch(max_num_reqs, MAX_LEN, 1_000, tables)
    for i, (num_prompt, num_output, computed, _) in enumerate(requests):
        blocks = tuple([1 + 50 * i + b for b in range(MAX_LEN // size)] for size in (16, 32))
        params = SamplingParams(temperature=0.5, seed=i)
        outputs = [500 + t for t in range(num_output)]
        prompt = [(90 * i + t) % 500 for t in range(num_prompt)]
        batch.add(CachedRequestState(str(i), prompt, params, blocks, computed, i, outputs))
        if num_output:
            batch.token_ids[i, num_prompt + num_output - 1] = -1 - i
    preparer = DeviceInputPreparer(MAX_TOKENS, max_num_reqs, 2, device)
    preparer.sampled.copy_(torch.arange(max_num_reqs) + 900)
    for buffer in (
        preparer.input_ids, preparer.positions, preparer._device_starts, preparer._device_lens,
        *preparer._slot_mappings,
    ):  # fmt: skip
        buffer.fill_(UNTOUCHED)
    preparer.prompt_graph_sizes = graphs
    step = preparer.prepare(batch, np.array([count for *_, count in requests]))
    size = step.attention[0].num_actual_tokens
    for buffer in (preparer.input_ids, preparer.positions, *preparer._slot_mappings):
        assert (buffer[size:] == UNTOUCHED).all()
    assert (preparer._device_lens[step.attention[0].num_reqs :] == UNTOUCHED).all()
    step.input_ids, step.positions = preparer.input_ids[:size], preparer.positions[:size]
    return step


@settings(max_examples=by_effort(10, 100))
@given(steps_with_prompts(), st.integers(0, 3), st.integers(0, 300))
def test_what_fills_a_captured_step_up_changes_nothing(requests, free_rows, spare) -> None:
    max_num_reqs, count = len(requests) + free_rows, sum(n for *_, n in requests)
    size = min(max(count + spare, max_num_reqs), MAX_TOKENS)
    plain = prepare_on_device(requests, max_num_reqs, [])
    step = prepare_on_device(requests, max_num_reqs, [count - 1, size, MAX_TOKENS + 1])
    assert (plain.prompt_graph_size, step.prompt_graph_size) == (0, size)
    assert torch.equal(step.input_ids[:count], plain.input_ids)
    assert torch.equal(step.positions[:count], plain.positions)
    assert not step.input_ids[count:].any() and not step.positions[count:].any()
    assert step.logits_indices.tolist() == plain.logits_indices.tolist()
    assert torch.equal(step.draw.uniforms, plain.draw.uniforms)
    rows = len(requests)
    for ours, theirs in zip(step.attention, plain.attention, strict=True):
        assert (ours.is_captured, ours.num_reqs) == (True, min(size, max_num_reqs))
        assert torch.equal(ours.slot_mapping[:count], theirs.slot_mapping)
        assert (ours.slot_mapping[count:] == -1).all()
        assert torch.equal(ours.seq_lens[:rows], theirs.seq_lens)
        assert not ours.seq_lens[rows:].any()
        assert torch.equal(ours.query_start_loc[: rows + 1], theirs.query_start_loc)
        assert (ours.query_start_loc[rows:] == count).all()
        assert torch.equal(ours.query_start_loc_cpu, ours.query_start_loc)
        assert torch.equal(ours.seq_lens_cpu, ours.seq_lens)
        assert torch.equal(ours.block_table_tensor[:rows], theirs.block_table_tensor)
