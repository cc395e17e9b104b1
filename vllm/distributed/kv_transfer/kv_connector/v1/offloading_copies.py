"""Host memory for whole blocks, and the copies between it and a cache, by byte runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm.errors import CapacityError
from vllm.v1.kv_cache.blocks import run_rows
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import block_runs

__all__ = ["HostBlocks"]


class HostBlocks:
    """``num_slots`` blocks of host memory; a slot holds the runs of one block of every group.

    Args:
        trailer_bytes: of each slot, behind its block, for somebody else.

    Raises:
        CapacityError: the host has not so much memory.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        kv_caches: Mapping[str, torch.Tensor],
        num_slots: int,
        trailer_bytes: int = 0,
    ) -> None:
        view = next(iter(kv_caches.values()))
        storage = view.untyped_storage()
        backing = torch.empty(0, dtype=torch.int8, device=view.device).set_(storage)
        self._groups = []
        offset = 0
        for group in range(len(config.kv_cache_groups)):
            parts = []
            for run in block_runs(config, group):
                rows = run_rows(backing, run, config.num_blocks)
                parts.append((rows, offset, run.count * run.length))
                offset += -(-run.count * run.length // 8) * 8
            self._groups.append(parts)
        pin = view.device.type == "cuda"
        pitch = offset + trailer_bytes
        try:
            self._host = torch.empty((num_slots, pitch), dtype=torch.int8, pin_memory=pin)
        except RuntimeError as error:
            raise CapacityError(
                f"cannot allocate {num_slots * pitch} bytes of host memory for offloading: lower "
                f"cpu_bytes_to_use ({error})"
            ) from error
        self._is_cuda = pin
        self._bytes_per_slot = offset
        self._stats: dict[str, float] = {}

    @property
    def slots(self) -> torch.Tensor:
        """int8 (slots, bytes of a block and of the trailer)."""
        return self._host

    @property
    def size_bytes(self) -> int:
        return self._host.numel()

    def load(self, slots: Sequence[int], blocks: Sequence[tuple[int, ...]]) -> None:
        """Copy host slots into blocks, before whatever the device runs next."""
        self._copy("load", slots, blocks)

    def store(self, slots: Sequence[int], blocks: Sequence[tuple[int, ...]]) -> None:
        """Copy blocks into host slots, after whatever the device runs now."""
        self._copy("store", slots, blocks)
        if self._is_cuda and slots:
            # A slot may be read by the next step's loads, which the same stream orders.
            torch.cuda.current_stream().synchronize()

    def _copy(self, what: str, slots: Sequence[int], blocks: Sequence[tuple[int, ...]]) -> None:
        if not slots:
            return
        begin = time.perf_counter()
        for slot, row in zip(slots, blocks, strict=True):
            for block, parts in zip(row, self._groups, strict=True):
                for rows, offset, size in parts:
                    on_device = rows[:, block]
                    on_host = self._host[slot, offset : offset + size]
                    on_host = on_host.view(rows.dtype).view(on_device.shape)
                    if what == "load":
                        on_device.copy_(on_host, non_blocking=True)
                    else:
                        on_host.copy_(on_device, non_blocking=True)
        self._count(f"{what}_bytes", len(slots) * self._bytes_per_slot)
        self._count(f"{what}_blocks", len(slots))
        self._count(f"{what}_seconds", time.perf_counter() - begin)

    def count_files(self, what: str, num_done: int, num_failed: int) -> None:
        """Blocks that went to files ("store") or came from them ("load")."""
        self._count(f"file_{what}_bytes", num_done * self._bytes_per_slot)
        self._count(f"file_failed_{what}s", num_failed)

    def _count(self, name: str, value: float) -> None:
        self._stats[f"offload_{name}"] = self._stats.get(f"offload_{name}", 0) + value

    def take_stats(self) -> dict[str, Any] | None:
        stats, self._stats = self._stats, {}
        return stats or None
