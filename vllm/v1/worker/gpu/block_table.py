"""Block tables that live on the device; the host tells only what has changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.device import DeviceLayer

__all__ = ["DeviceBlockTable"]

_NOTHING = np.empty(0, dtype=np.int32)


class DeviceBlockTable(BlockTable):
    """``device_table`` is brought up to date by whoever takes the changes."""

    def __init__(
        self,
        block_size: int,
        kernel_block_size: int,
        max_num_reqs: int,
        max_num_blocks_per_req: int,
        device: DeviceLayer,
    ) -> None:
        super().__init__(
            block_size, kernel_block_size, max_num_reqs, max_num_blocks_per_req, device
        )
        self.device_table = torch.zeros(self.array.shape, dtype=torch.int32, device=device.device)
        """int32 ``(max_num_reqs, max kernel blocks)``."""
        # (row, first, end) of entries that the device has not got.
        self._changes: list[tuple[int, int, int]] = []

    def device_view(self, num_reqs: int) -> torch.Tensor:
        return self.device_table[:num_reqs]

    def append_row(self, row: int, block_ids: Sequence[int]) -> None:
        start = int(self.num_blocks[row])
        super().append_row(row, block_ids)
        end = int(self.num_blocks[row])
        if end > start:
            self._changes.append((row, start, end))

    def move_row(self, source: int, target: int) -> None:
        super().move_row(source, target)
        self._changes.append((target, 0, int(self.num_blocks[target])))

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Places (row * width + column) and values, both int32; none twice with two values."""
        changes, self._changes = self._changes, []
        if not changes:
            return _NOTHING, _NOTHING
        width = self.array.shape[1]
        places = np.concatenate(
            [np.arange(row * width + start, row * width + end) for row, start, end in changes]
        ).astype(np.int32)
        return places, self.array.reshape(-1)[places]
