"""Block tables of the running requests: one per KV-cache group, in kernel blocks.

The scheduler speaks of manager blocks; a kernel may read smaller ones. Manager block ``b`` is
kernel blocks ``b * ratio .. b * ratio + ratio - 1``. Knows nothing of what a block holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm.v1.worker.device import DeviceLayer

__all__ = ["BlockTable", "MultiGroupBlockTable"]


class BlockTable:
    """The block table of one KV-cache group.

    Args:
        block_size: tokens of a manager block.
        kernel_block_size: tokens of a kernel block; divides ``block_size``.
        max_num_reqs: rows.
        max_num_blocks_per_req: manager blocks that one request holds at most.
    """

    def __init__(
        self,
        block_size: int,
        kernel_block_size: int,
        max_num_reqs: int,
        max_num_blocks_per_req: int,
        device: DeviceLayer,
    ) -> None:
        assert block_size % kernel_block_size == 0, (block_size, kernel_block_size)
        self.block_size = block_size
        self.kernel_block_size = kernel_block_size
        self.blocks_per_manager_block = block_size // kernel_block_size
        width = max_num_blocks_per_req * self.blocks_per_manager_block
        self._table = device.make_buffer((max_num_reqs, width), torch.int32)
        self._width = width
        self._entries = self._table.np.reshape(-1)
        self._split = np.arange(self.blocks_per_manager_block, dtype=np.int32)
        self.num_blocks = np.zeros(max_num_reqs, dtype=np.int32)
        """Kernel blocks of each row."""

    @property
    def array(self) -> np.ndarray:
        """int32 ``(max_num_reqs, max kernel blocks)``; rows of the batch come first."""
        return self._table.np

    def device_view(self, num_reqs: int) -> torch.Tensor:
        """int32 ``(num_reqs, max kernel blocks)`` on the device."""
        return self._table.device_view(num_reqs)

    def append_row(self, row: int, block_ids: Sequence[int]) -> None:
        start, ratio = int(self.num_blocks[row]), self.blocks_per_manager_block
        end = start + len(block_ids) * ratio
        if ratio == 1:
            self.array[row, start:end] = block_ids
        else:
            ids = np.asarray(block_ids, dtype=np.int32)
            self.array[row, start:end] = (ids[:, None] * ratio + self._split).reshape(-1)
        self.num_blocks[row] = end

    def set_row(self, row: int, block_ids: Sequence[int]) -> None:
        self.num_blocks[row] = 0
        self.append_row(row, block_ids)

    def get_row(self, row: int) -> list[int]:
        """Ids of the row's manager blocks."""
        ratio = self.blocks_per_manager_block
        ids = self.array[row, : self.num_blocks[row] : ratio]
        return (ids if ratio == 1 else ids // ratio).tolist()

    def move_row(self, source: int, target: int) -> None:
        count = self.num_blocks[source]
        self.array[target, :count] = self.array[source, :count]
        self.num_blocks[target] = count

    def slot_mapping(self, rows: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
        """Write the slot of each token: kernel block id * kernel block size + offset.

        Args:
            rows: int64 ``(T,)``, batch row of each token.
            positions: int64 ``(T,)``, position of each token in its request.
            out: int64 ``(T,)``.
        """
        size = self.kernel_block_size
        block = positions // size
        np.subtract(self._entries[rows * self._width + block], block, out=out)
        out *= size
        out += positions


class MultiGroupBlockTable:
    """One ``BlockTable`` per KV-cache group, changed in step."""

    def __init__(self, tables: Sequence[BlockTable]) -> None:
        self.tables = tuple(tables)

    def __getitem__(self, group: int) -> BlockTable:
        return self.tables[group]

    def append_row(self, row: int, block_ids: Sequence[Sequence[int]]) -> None:
        for table, ids in zip(self.tables, block_ids, strict=True):
            table.append_row(row, ids)

    def set_row(self, row: int, block_ids: Sequence[Sequence[int]]) -> None:
        for table, ids in zip(self.tables, block_ids, strict=True):
            table.set_row(row, ids)

    def get_row(self, row: int) -> tuple[list[int], ...]:
        return tuple(table.get_row(row) for table in self.tables)

    def move_row(self, source: int, target: int) -> None:
        for table in self.tables:
            table.move_row(source, target)
