"""Blocks to one contiguous buffer and back, and blocks that arrived in another order set right.

Driven by byte runs of a descriptor, or by a view's strides; asks nothing about meaning. Offloading
and connectors through host memory stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.errors import KVTransferError
from vllm.v1.kv_cache.blocks import run_rows
from vllm.v1.kv_cache.descriptors import CacheDescriptor

__all__ = ["BlockPacker", "permute_received_blocks", "zero_states_from"]


class BlockPacker:
    """Gathers the bytes that one group owns of some blocks, and scatters them back.

    A packed block is the group's runs end to end, in the order of ``CacheDescriptor.group_runs``.

    Args:
        backing: the cache's 1-D int8 allocation.
    """

    def __init__(self, backing: torch.Tensor, descriptor: CacheDescriptor, group: int) -> None:
        self._backing = backing
        self._runs = descriptor.group_runs(group)
        self._rows = [run_rows(backing, run, descriptor.num_blocks) for run in self._runs]
        self.num_blocks = descriptor.num_blocks
        self.bytes_per_block = sum(run.count * run.length for run in self._runs)

    def gather(self, block_ids: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """The bytes of ``block_ids`` as int8 ``(len(block_ids), bytes_per_block)``, contiguous.

        Args:
            out: to be filled instead of a new tensor; may lie on another device.
        """
        shape = (len(block_ids), self.bytes_per_block)
        if out is None:
            out = self._backing.new_empty(shape)
        self._check(out, block_ids)
        start = 0
        for run, rows in zip(self._runs, self._rows, strict=True):
            size = run.count * run.length
            place = out[:, start : start + size].unflatten(1, (run.count, run.length))
            start += size
            if self._one_by_one(out):
                for i, block_id in enumerate(block_ids):
                    place[i].copy_(rows[:, block_id].view(torch.int8))
            else:
                taken = rows.index_select(1, self._index(block_ids)).view(torch.int8)
                place.copy_(taken.transpose(0, 1))
        return out

    def scatter(self, packed: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Put what ``gather`` returned, of this cache or a like one, into ``block_ids``."""
        self._check(packed, block_ids)
        assert len(set(block_ids)) == len(block_ids), f"a block is written twice: {block_ids}"
        start = 0
        for run, rows in zip(self._runs, self._rows, strict=True):
            size = run.count * run.length
            place = packed[:, start : start + size].unflatten(1, (run.count, run.length))
            start += size
            if self._one_by_one(packed):
                for i, block_id in enumerate(block_ids):
                    rows[:, block_id].view(torch.int8).copy_(place[i])
            else:
                words = place.transpose(0, 1).clone(memory_format=torch.contiguous_format)
                rows.index_copy_(1, self._index(block_ids), words.to(rows.device).view(rows.dtype))

    def _one_by_one(self, other: torch.Tensor) -> bool:
        return self._backing.device.type == "cpu" and other.device.type == "cpu"

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._backing.device)

    def _check(self, packed: torch.Tensor, block_ids: Sequence[int]) -> None:
        shape = (len(block_ids), self.bytes_per_block)
        if tuple(packed.shape) != shape or packed.dtype != torch.int8:
            raise KVTransferError(
                f"a buffer of {len(block_ids)} packed blocks is int8 {shape}, not {packed.dtype} "
                f"{tuple(packed.shape)}"
            )
        assert all(0 <= b < self.num_blocks for b in block_ids), f"no such blocks: {block_ids}"


def permute_received_blocks(
    cache: torch.Tensor,
    block_ids: Sequence[int] | torch.Tensor,
    parts: int = 1,
    received_order: str | None = None,
) -> None:
    """Set blocks right, in place, that arrived as raw bytes of a peer's order.

    Args:
        cache: a layer's view ``(B, H, N, C)`` by manager blocks, whose pages are dense runs.
        parts: peer's blocks in one of ours; each arrived as a page of ``N / parts`` tokens.
        received_order: "HND" or "NHD", the order inside a peer's page; None for our own.

    Raises:
        KVTransferError: pages are not dense runs, ``parts`` does not divide the tokens, or the
            order has another name.
    """
    _, heads, tokens, content = cache.shape
    inner = tuple(cache.stride()[1:])
    dense = {"HND": (tokens * content, content, 1), "NHD": (content, heads * content, 1)}
    orders = [name for name, strides in dense.items() if _same(inner, strides, cache.shape[1:])]
    if not orders:
        raise KVTransferError(
            f"blocks of shape {tuple(cache.shape[1:])} with strides {inner} are not kept together, "
            "so received bytes cannot be set right in place: use a layout that keeps a page "
            "together (LBHNC, LBNHC, BLHNC, BLNHC)"
        )
    if tokens % parts:
        raise KVTransferError(f"blocks of {tokens} tokens are not {parts} whole blocks of a peer")
    order = received_order or orders[0]
    if order not in dense:
        raise KVTransferError(f"a page's order is HND or NHD, not {order!r}")
    if order in orders and (parts == 1 or "NHD" in orders):
        return
    pages = cache.as_strided(
        (cache.shape[0], heads * tokens * content), (cache.stride(0), 1), cache.storage_offset()
    )
    ids = torch.as_tensor(block_ids, dtype=torch.int64, device=cache.device)
    received = pages.index_select(0, ids)
    each = tokens // parts
    if order == "HND":
        logical = received.view(-1, parts, heads, each, content).permute(0, 2, 1, 3, 4)
    else:
        logical = received.view(-1, parts, each, heads, content).permute(0, 3, 1, 2, 4)
    logical = logical.flatten(2, 3)
    physical = logical if orders[0] == "HND" else logical.transpose(1, 2)
    pages.index_copy_(0, ids, physical.flatten(1))


def zero_states_from(cache: torch.Tensor, block_id: int, first_state: int) -> None:
    """Clear states ``[first_state, N)`` of one block, for all heads: what a transfer left unfilled.

    ``cache`` is ``(B, H, N, C)`` by manager blocks; tokens are axis 2 for every kind of cache.
    """
    cache.narrow(0, block_id, 1).narrow(2, first_state, cache.shape[2] - first_state).zero_()


def _same(strides: Sequence[int], wanted: Sequence[int], shape: Sequence[int]) -> bool:
    """Equal strides, but for axes of one element."""
    return all(a == b for a, b, size in zip(strides, wanted, shape, strict=True) if size > 1)
