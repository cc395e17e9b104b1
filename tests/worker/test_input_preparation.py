"""A step's tensors are what a loop over its tokens would make."""

import numpy as np
import pytest

from vllm.sampling_params import SamplingParams
from vllm.v1.worker.block_table import BlockTable, MultiGroupBlockTable
from vllm.v1.worker.device import CPUDeviceLayer
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
