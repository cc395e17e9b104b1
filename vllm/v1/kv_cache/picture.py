"""One block of the cache as a picture for a terminal: whose bytes lie where.

Data first (``block_maps``), then a renderable of the library ``rich``. Decides nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import runs_by_layer

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["BlockMap", "block_maps", "render_maps"]

_SHADES = ("#5f87d7", "#87afff", "#5faf87", "#87d7af")
_EMPTY = "."


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMap:
    """How the groups that are cut alike use the bytes of a block that they own."""

    kind: str
    count: int
    """Groups with this map."""
    layers: tuple[str, ...]
    """Of the first of them."""
    size_bytes: int
    pieces: tuple[tuple[int, int, int], ...]
    """(start, end, index of the layer), ascending, from the start of the block."""

    def owner_at(self, position: int) -> int | None:
        """Index of the layer that owns this byte; None for padding."""
        for start, end, layer in self.pieces:
            if start <= position < end:
                return layer
        return None


def block_maps(config: KVCacheConfig) -> tuple[BlockMap, ...]:
    """A map for each way in which groups use a block, the commonest group kinds first.

    Where blocks are outermost, positions are those in memory. Where layers are compact, the pages
    of one block are shown end to end, though each lies in its layer's own stretch.
    """
    size = config.bytes_per_block
    by_layer = runs_by_layer(config)
    found: dict[tuple[object, ...], tuple[str, ...]] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for group in config.kv_cache_groups:
        pieces: list[tuple[int, int, int]] = []
        before = 0
        for index, name in enumerate(group.layer_names):
            runs = by_layer.get(name, ())
            if config.kv_cache_layout.is_block_outermost:
                spans = [(at, at + run.length) for run in runs for at in run.offsets()]
            else:
                spans = [(before, before + sum(run.length * run.count for run in runs))]
                before += group.spec_of(name).page_size_bytes
            pieces += [(start, end, index) for start, end in spans]
        key = (group.kv_cache_spec.manager_spec.kind.value, tuple(sorted(pieces)))
        found.setdefault(key, tuple(group.layer_names))
        counts[key] += 1
    return tuple(
        BlockMap(
            kind=str(key[0]),
            count=counts[key],
            layers=layers,
            size_bytes=size,
            pieces=key[1],  # type: ignore[arg-type]
        )
        for key, layers in found.items()
    )


def render_maps(maps: tuple[BlockMap, ...], width: int = 64) -> Group:
    """A bar of ``width`` cells for each map; neighbouring layers differ in shade, padding is dots.

    A cell shows who owns the byte in its middle.
    """
    from rich.console import Group
    from rich.text import Text

    size = maps[0].size_bytes if maps else 0
    lines = [Text(f"One block of {size:,} bytes, as each group uses it", style="bold")]
    for item in maps:
        bar = Text("  |")
        for cell in range(width):
            owner = item.owner_at((2 * cell + 1) * size // (2 * width))
            if owner is None:
                bar.append(_EMPTY, style="dim")
            else:
                bar.append("█" if owner % 2 else "▓", style=_SHADES[owner % len(_SHADES)])
        used = sum(end - start for start, end, _ in item.pieces)
        bar.append(
            f"| {item.count} x {item.kind}: {len(item.layers)} layers, {used:,} bytes, "
            f"{size - used:,} empty"
        )
        lines.append(bar)
    return Group(*lines)
