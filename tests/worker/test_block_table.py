"""Block tables split manager blocks into kernel blocks and turn positions into slots."""

import numpy as np
import pytest

from vllm.v1.worker.block_table import BlockTable, MultiGroupBlockTable
from vllm.v1.worker.device import CPUDeviceLayer


def make_table(block_size: int, kernel_block_size: int) -> BlockTable:
    return BlockTable(block_size, kernel_block_size, 4, 6, CPUDeviceLayer())


@pytest.mark.parametrize(("block_size", "kernel_block_size"), [(16, 16), (32, 16), (48, 16)])
def test_slots_lie_where_the_tokens_block_lies(block_size, kernel_block_size):
    table = make_table(block_size, kernel_block_size)
    blocks = {0: [7, 3, 5], 2: [1, 9]}
    for row, ids in blocks.items():
        table.append_row(row, ids[:1])
        table.append_row(row, ids[1:])
    tokens = [
        (row, position) for row, ids in blocks.items() for position in range(len(ids) * block_size)
    ]
    rows = np.array([row for row, _ in tokens])
    positions = np.array([position for _, position in tokens])
    slots = np.empty(len(tokens), dtype=np.int64)
    table.slot_mapping(rows, positions, slots)
    # Manager and kernel blocks count the same tokens, so slots don't depend on the split.
    assert slots.tolist() == [
        blocks[row][position // block_size] * block_size + position % block_size
        for row, position in tokens
    ]


def test_kernel_blocks_of_a_manager_block_follow_each_other():
    table = make_table(48, 16)
    table.set_row(1, [2, 0])
    assert table.num_blocks[1] == 6
    assert table.array[1, :6].tolist() == [6, 7, 8, 0, 1, 2]


def test_conformance_blocks_of_64_read_as_16_and_states_as_they_are():
    split, states = make_table(64, 16), make_table(64, 64)
    for table in (split, states):
        table.set_row(0, [2, 0, 1])
    assert split.array[0, :12].tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    assert states.array[0, :3].tolist() == [2, 0, 1]


@pytest.mark.parametrize(("block_size", "kernel_block_size"), [(16, 16), (48, 16)])
def test_a_row_is_given_back_in_manager_blocks(block_size, kernel_block_size):
    table = make_table(block_size, kernel_block_size)
    table.set_row(1, [2, 0])
    table.append_row(1, [5])
    assert table.get_row(1) == [2, 0, 5]
    assert table.get_row(0) == []


def test_set_replaces_and_move_copies():
    table = make_table(16, 16)
    table.set_row(0, [1, 2, 3])
    table.set_row(0, [4])
    table.append_row(0, [])
    table.move_row(0, 3)
    assert table.num_blocks[[0, 3]].tolist() == [1, 1]
    assert table.array[3, 0] == 4


def test_the_device_sees_what_the_host_wrote():
    table = make_table(32, 16)
    view = table.device_view(2)
    table.set_row(1, [5])
    assert view.shape == (2, 12)
    assert view[1, :2].tolist() == [10, 11]


def test_groups_change_in_step():
    tables = MultiGroupBlockTable([make_table(16, 16), make_table(32, 16)])
    tables.set_row(0, ([1, 2], [3]))
    tables.append_row(0, ([4], []))
    tables.move_row(0, 1)
    assert tables[0].array[1, :3].tolist() == [1, 2, 4]
    assert tables[1].array[1, :2].tolist() == [6, 7]
