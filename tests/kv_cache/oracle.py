"""Where every byte of a plan must lie, from the rules alone, and what a plan must keep.

Pure Python over integers: nothing of the product is called but what describes a spec's page (H, N,
C and the room it takes). ``addresses_of`` reads the truth from memory instead.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch

ALIGNMENT = 16


def up(value: int, step: int) -> int:
    return -(-value // step) * step


def room(spec) -> int:
    """Bytes until the next page in a packed block."""
    return up(spec.page_size_bytes, math.lcm(ALIGNMENT, spec.view_alignment))


def cut(spec) -> tuple:
    """Layers with equal values lie together."""
    return (
        type(spec).__name__,
        spec.kind,
        spec.content_format,
        spec.storage_dtype,
        spec.num_heads,
        spec.num_states,
        spec.state_content_size_bytes,
        spec.unpadded_page_size_bytes,
        spec.page_size_bytes,
        spec.state_table,
    )


def in_order(layers: dict) -> list[list[str]]:
    """A group's layers as they lie: those that are cut alike together, else as they come."""
    runs: dict[tuple, list[str]] = {}
    for name, spec in layers.items():
        runs.setdefault(cut(spec), []).append(name)
    return list(runs.values())


class Rules:
    """Address of every byte of every page of a plan.

    Args:
        groups: of each group, layer name -> spec.
        layout: name of the layout.
        kernel_blocks: of each group, kernel blocks in a block.
    """

    def __init__(self, groups, layout: str, num_blocks: int, kernel_blocks=None) -> None:
        self.groups, self.layout, self.num_blocks = groups, layout, num_blocks
        self.kernel_blocks = kernel_blocks or [1] * len(groups)
        specs = [spec for layers in groups for spec in layers.values()]
        largest = max(sum(room(s) for s in layers.values()) for layers in groups)
        step = math.lcm(ALIGNMENT, *(s.stride_alignment for s in specs))
        self.block_bytes = up(largest, step)
        self.size_bytes = self.block_bytes * num_blocks
        self._at: dict[str, tuple[int, int, int, int]] = {}
        for group, layers in enumerate(groups):
            before = 0
            for run in in_order(layers):
                spec = layers[run[0]]
                for index, name in enumerate(run):
                    self._at[name] = (group, before, index, len(run))
                if layout[0] == "L":
                    step = math.lcm(ALIGNMENT, spec.view_alignment)
                    before += len(run) * up(spec.page_size_bytes * num_blocks, step)
                elif layout[1] == "L":
                    before += len(run) * room(spec)
                else:
                    before += len(run) * spec.page_size_bytes

    def page(self, name: str, block: int) -> np.ndarray:
        """Addresses as int64 (kernel blocks, H, N of one, C)."""
        group, before, layer, count = self._at[name]
        spec = self.groups[group][name]
        ratio = self.kernel_blocks[group]
        sizes = {"H": spec.num_heads, "N": spec.num_states // ratio}
        content = spec.state_content_size_bytes
        dense = sizes["H"] * sizes["N"] * content
        found = np.empty((ratio, sizes["H"], sizes["N"], content), dtype=np.int64)
        for part, head, state in product(range(ratio), range(sizes["H"]), range(sizes["N"])):
            at = {"L": layer, "B": block, "H": head, "N": state}
            if self.layout[2:] in ("HNC", "NHC"):
                inner = 0
                for axis in self.layout[2:4]:
                    inner = inner * sizes[axis] + at[axis]
                inner = inner * content + part * dense
                if self.layout[0] == "B":
                    start = block * self.block_bytes + before + layer * room(spec)
                else:
                    step = math.lcm(ALIGNMENT, spec.view_alignment)
                    stretch = up(spec.page_size_bytes * self.num_blocks, step)
                    start = before + layer * stretch + block * spec.page_size_bytes
                start += inner
            else:
                assert ratio == 1 or sizes["H"] == 1
                slot = sizes["N"] * content
                if self.layout == "BHLNC":
                    start = block * self.block_bytes + before
                    start += (head * count + layer) * slot + state * content
                else:  # LHBNC
                    step = math.lcm(ALIGNMENT, spec.view_alignment)
                    stretch = up(spec.page_size_bytes * self.num_blocks, step)
                    start = before + layer * stretch + part * dense
                    start += (head * self.num_blocks + block * ratio) * slot + state * content
            found[part, head, state] = np.arange(start, start + content)
        return found


def addresses_of(backing: torch.Tensor, views: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Addresses of every byte of every view, (B, H, N, C in bytes), as memory shows them.

    The backing is filled with the digits of each byte's address, one digit after the other.
    """
    positions = np.arange(backing.numel(), dtype=np.int64)
    found = dict.fromkeys(views, 0)
    for digit in range(4):
        values = (positions >> (8 * digit)) & 255
        backing.copy_(torch.from_numpy(values.astype(np.uint8)).view(torch.int8))
        for name, view in views.items():
            seen = view.view(torch.uint8).numpy().astype(np.int64)
            found[name] = found[name] + (seen << (8 * digit))
    return found


def check_disjoint(pages: dict[tuple[int, str, int], np.ndarray], size_bytes: int) -> None:
    """No byte has two owners; all lie inside the allocation.

    Owners are (group, layer, block). Groups overlay each other, so a byte may belong to layers of
    different groups, but only within one block id.
    """
    layer_at: dict[int, np.ndarray] = {}
    block_at = np.full(size_bytes, -1, dtype=np.int64)
    numbers: dict[str, int] = {}
    for (group, name, block), addresses in pages.items():
        flat = addresses.ravel()
        assert flat.min() >= 0, f"{name}, block {block}: starts before the allocation"
        assert flat.max() < size_bytes, f"{name}, block {block}: ends behind the allocation"
        assert len(np.unique(flat)) == len(flat), f"{name}, block {block}: overlaps itself"
        blocks = block_at[flat]
        assert ((blocks == -1) | (blocks == block)).all(), f"{name}: block {block} overlaps another"
        block_at[flat] = block
        owner = layer_at.setdefault(group, np.full(size_bytes, -1, dtype=np.int64))
        number = numbers.setdefault(name, len(numbers))
        assert (owner[flat] == -1).all(), f"{name}, block {block}: overlaps a layer of its group"
        owner[flat] = number
