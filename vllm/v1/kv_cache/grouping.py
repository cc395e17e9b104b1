"""Which layers share a block table, and how their pages fill a block with little waste.

Owns the arithmetic of grouping. A *kind* is the set of layers that need the same blocks at the
same time (equal ``group_key``). With one kind there is one group. With several, a block id
belongs to one group at a time and all groups overlay each other in it, so a block is as large as
the largest group, and the kinds are cut into groups of nearly equal size.

What counts is the bytes that requests need, block bytes * sum over groups of blocks held, for a
mix that has as many tokens in requests of the longest length as in short ones: the long ones
alone would hide what is wasted once per request. One of them is in the middle of its prompt; the
others hold what they read.

Pure: integers in, integers out; the specs may come back with other block sizes or paddings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from vllm.errors import ConfigError
from vllm.v1.kv_cache.attention_specs import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache.content import cdiv, round_up
from vllm.v1.kv_cache.latent_specs import MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_specs import MambaSpec, UniformTypeKVCacheSpecs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "Grouping",
    "LayerGroup",
    "group_packed",
    "group_with_equal_pages",
    "page_room",
    "promote_to_full",
    "unify_kv_cache_spec_page_size",
]

Specs = Mapping[str, KVCacheSpec]

PAGE_ALIGNMENT = 16
"""Every page of a packed block starts at a multiple of this: the widest vector load."""
_NEARLY = 1.02
"""Groupings that need at most 2 % more memory than the best are as good; fewer groups win."""
_MANY_GROUPS = 8
"""Block tables that the host can prepare in a step without being noticed."""
_COST_OF_A_GROUP = 0.005
"""A group more than that must save half a percent of memory."""
COMPARED_REQUEST = 8192
"""Tokens of the request by which plans are compared with the rule of equal pages."""
_MAX_BLOCK_SCALE = 128
_SHORT_REQUEST = 2048
"""Tokens of the short requests in the mix that groupings are judged by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of one block table. ``spec`` is theirs, or a uniform-type collection of theirs."""

    layer_names: tuple[str, ...]
    spec: KVCacheSpec
    blocks_per_request: int
    """Blocks that a request of the longest length holds."""
    blocks_of_mix: int
    """Blocks that the mix of requests holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    groups: tuple[LayerGroup, ...]
    specs: dict[str, KVCacheSpec]
    """Each layer's own spec, as it came out."""
    bytes_per_block: int
    notes: tuple[str, ...] = ()
    """What was changed in the specs, for the explanation."""
    padded: bool = False
    """Pages were padded to equal others."""
    compared_bytes: int = 0
    """Bytes that a request of ``COMPARED_REQUEST`` tokens holds between two steps."""

    @property
    def bytes_per_request(self) -> int:
        """Bytes of one request of the longest length."""
        return self.bytes_per_block * sum(group.blocks_per_request for group in self.groups)

    @property
    def bytes_of_mix(self) -> int:
        """Bytes of the mix of long and short requests: what groupings are compared by."""
        return self.bytes_per_block * sum(group.blocks_of_mix for group in self.groups)

    def is_below(self, ceiling: int | None) -> bool:
        """The compared request holds at most ``ceiling`` bytes; None allows everything."""
        return ceiling is None or self.compared_bytes <= ceiling

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Among groupings of nearly equal memory: too many groups, padding, changed blocks."""
        return (max(len(self.groups), _MANY_GROUPS), self.padded, len(self.notes))


def page_room(spec: KVCacheSpec) -> int:
    """Bytes that a page takes in a packed block, so that the next one starts aligned."""
    return round_up(spec.page_size_bytes, math.lcm(PAGE_ALIGNMENT, spec.view_alignment))


def kinds_of(specs: Specs) -> dict[tuple[Any, ...], list[str]]:
    """Layer names by kind, in the order of the layers."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, spec in specs.items():
        kinds.setdefault(spec.group_key, []).append(name)
    return kinds


def group_packed(
    specs: Specs,
    vllm_config: VllmConfig,
    accepts_block: Callable[[Specs], bool] | None = None,
    ceiling: int | None = None,
) -> Grouping:
    """Group for a block-outermost layout: pages of any sizes side by side in a block.

    Args:
        accepts_block: whether kernels read the blocks of these specs whole; blocks are only
            enlarged to sizes that it accepts. None where block sizes must stay as they are.
        ceiling: bytes that ``compared_bytes`` should not exceed, where a grouping allows it.
    """
    # Layers that are alike share one object here: a scale costs as many specs as there are kinds.
    alike: dict[KVCacheSpec, KVCacheSpec] = {}
    shared = {name: alike.setdefault(spec, spec) for name, spec in specs.items()}
    best: tuple[Grouping, int] | None = None
    for scale in _block_scales(shared) if accepts_block else [1]:
        scaled = _scale_blocks(shared, scale)
        if scale > 1 and accepts_block is not None and not accepts_block(scaled):
            continue
        grouping = _split_kinds(scaled, vllm_config, ceiling)
        if best is None or _better(grouping, scale, *best, ceiling):
            best = (grouping, scale)
    assert best is not None
    scale = best[1]
    grouping = _split_kinds(_scale_blocks(specs, scale), vllm_config, ceiling)
    if scale > 1:
        note = f"attention blocks enlarged {scale} times, to fill the block that a state page needs"
        grouping = replace(grouping, notes=(note,))
    return grouping


def _better(
    new: Grouping, new_scale: int, old: Grouping, old_scale: int, ceiling: int | None
) -> bool:
    """Below the ceiling; less memory; among nearly equals first few groups, then small blocks."""
    below, was_below = new.is_below(ceiling), old.is_below(ceiling)
    if below != was_below:
        return below
    if new.bytes_of_mix * _NEARLY < old.bytes_of_mix:
        return True
    if old.bytes_of_mix * _NEARLY < new.bytes_of_mix:
        return False

    def key(grouping: Grouping, scale: int) -> tuple[Any, ...]:
        count = len(grouping.groups)
        return (max(count, _MANY_GROUPS), scale, count, grouping.bytes_of_mix)

    return key(new, new_scale) < key(old, old_scale)


def _block_scales(specs: Specs) -> list[int]:
    """Factors by which attention blocks may grow to meet a state page of fixed size."""
    states = [spec.page_size_bytes for spec in specs.values() if not spec.uses_slot_mapping]
    others = [spec.page_size_bytes for spec in specs.values() if spec.uses_slot_mapping]
    if not states or not others:
        return [1]
    meets = cdiv(max(states), min(others))
    return [
        *range(1, min(meets, _MAX_BLOCK_SCALE) + 1),
        *({meets} - set(range(_MAX_BLOCK_SCALE + 1))),
    ]


def _scale_blocks(specs: Specs, scale: int) -> dict[str, KVCacheSpec]:
    def scaled(spec: KVCacheSpec) -> KVCacheSpec:
        follows = spec.uses_slot_mapping or (
            isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align"
        )
        if scale == 1 or not follows:
            return spec
        return spec.copy_with_new_block_size(spec.block_size * scale)

    once = {id(spec): scaled(spec) for spec in specs.values()}
    return {name: once[id(spec)] for name, spec in specs.items()}


def _split_kinds(specs: Specs, vllm_config: VllmConfig, ceiling: int | None) -> Grouping:
    """Cut each kind into groups (every g-th layer) so that the mix of requests needs least memory.

    Of cuts that need nearly as little as the best one, that into the fewest groups; each group
    beyond ``_MANY_GROUPS`` counts as ``_COST_OF_A_GROUP`` more memory.
    """
    kinds = list(kinds_of(specs).values())
    held = [_blocks_held(specs[names[0]], vllm_config) for names in kinds]
    if len(kinds) == 1:
        return _make_grouping(kinds, [1], held, specs)
    # sizes[k][g - 1]: bytes of the largest group when kind k is cut into g groups.
    sizes = [_largest_parts([page_room(specs[name]) for name in names]) for names in kinds]
    options: list[tuple[bool, float, list[int]]] = []
    for limit in sorted({size for row in sizes for size in row}):
        cuts = [next((g for g, s in enumerate(row, 1) if s <= limit), 0) for row in sizes]
        if not all(cuts):
            continue
        block = max(row[cut - 1] for row, cut in zip(sizes, cuts, strict=True))
        mix, compared = (
            block * sum(cut * blocks[i] for cut, blocks in zip(cuts, held, strict=True))
            for i in (1, 2)
        )
        above = ceiling is not None and compared > ceiling
        dear = 1 + _COST_OF_A_GROUP * max(0, sum(cuts) - _MANY_GROUPS)
        options.append((above, mix * dear, cuts))
    below = [option for option in options if not option[0]] or options
    least = min(cost for _, cost, _ in below)
    good = [(sum(cuts), cost, cuts) for _, cost, cuts in below if cost <= least * _NEARLY]
    return _make_grouping(kinds, min(good)[2], held, specs)


def _blocks_held(spec: KVCacheSpec, vllm_config: VllmConfig) -> tuple[int, int, int]:
    """Blocks of the longest request, of the mix of long and short ones, and of the compared one."""
    max_model_len = vllm_config.model_config.max_model_len
    length = min(_SHORT_REQUEST, max_model_len)
    longest = spec.max_resident_blocks(vllm_config)
    short = spec.blocks_at(length, vllm_config)
    compared = spec.blocks_at(min(COMPARED_REQUEST, max_model_len), vllm_config)
    return longest, longest + cdiv(max_model_len, length) * short, compared


def _largest_parts(rooms: Sequence[int]) -> list[int]:
    """Bytes of the largest part when every g-th page goes to one of g parts, for g = 1, 2, ..."""
    counts = range(1, len(rooms) + 1)
    if len(set(rooms)) == 1:
        return [rooms[0] * cdiv(len(rooms), count) for count in counts]
    return [max(sum(rooms[i::count]) for i in range(count)) for count in counts]


def _make_grouping(
    kinds: Sequence[Sequence[str]],
    cuts: Sequence[int],
    held: Sequence[tuple[int, int, int]],
    specs: Specs,
) -> Grouping:
    groups = [
        LayerGroup(
            layer_names=part,
            spec=_group_spec(part, specs),
            blocks_per_request=longest,
            blocks_of_mix=mix,
        )
        for names, cut, (longest, mix, _) in zip(kinds, cuts, held, strict=True)
        for part in (tuple(names[i::cut]) for i in range(cut))
    ]
    room = max(sum(page_room(specs[name]) for name in group.layer_names) for group in groups)
    stride = math.lcm(PAGE_ALIGNMENT, *(spec.stride_alignment for spec in specs.values()))
    block = round_up(room, stride)
    compared = sum(cut * blocks for cut, (_, _, blocks) in zip(cuts, held, strict=True))
    return Grouping(
        groups=tuple(groups),
        specs=dict(specs),
        bytes_per_block=block,
        compared_bytes=compared * block,
    )


def _group_spec(names: Sequence[str], specs: Specs) -> KVCacheSpec:
    members = [specs[name] for name in names]
    shapes = {
        (type(s), s.num_heads, s.num_states, s.state_content_size_bytes, s.page_size_bytes)
        for s in members
    }
    same_dtype = len({spec.storage_dtype for spec in members}) == 1
    if len(shapes) == 1 and same_dtype and len(set(members)) == 1:
        return members[0].with_layer_name("")
    if len(shapes) == 1 and same_dtype and type(members[0]) is FullAttentionSpec:
        return FullAttentionSpec.merge(members)
    return UniformTypeKVCacheSpecs(
        block_size=members[0].block_size, kv_cache_specs=dict(zip(names, members, strict=True))
    )


def group_with_equal_pages(
    specs: Specs,
    vllm_config: VllmConfig,
    may_change_blocks: bool = True,
    accepts_block: Callable[[Specs], bool] | None = None,
    ceiling: int | None = None,
) -> Grouping:
    """Group for a layer-compact layout.

    One kind: every layer has its own stretch of memory, whatever its page. Several kinds: group
    g's i-th layer shares the i-th stretch with the i-th layers of all other groups, so all pages
    are made equal first. Arguments as ``group_packed``'s.

    Raises:
        ConfigError: the pages cannot be made equal.
    """
    notes: tuple[str, ...] = ()
    if len(kinds_of(specs)) > 1:
        specs, notes = unify_kv_cache_spec_page_size(
            specs, vllm_config, may_change_blocks, accepts_block
        )
    grouping = _split_kinds(specs, vllm_config, ceiling)
    return replace(grouping, notes=notes, padded=any("padded" in note for note in notes))


def unify_kv_cache_spec_page_size(
    specs: Specs,
    vllm_config: VllmConfig,
    may_change_blocks: bool = True,
    accepts_block: Callable[[Specs], bool] | None = None,
) -> tuple[dict[str, KVCacheSpec], tuple[str, ...]]:
    """The same layers with pages of one size, and what was done to get there.

    The largest page rules. Where it is a state's, attention blocks grow to reach it, and state
    pages are padded. Any other page has its block enlarged, is padded, or both: whichever needs
    the fewest bytes for the mix of requests. A latent page is never padded, since its kernels
    read dense pages; nor is a block enlarged *and* padded beyond what its kernels read whole.

    Raises:
        ConfigError: a latent page would have to be padded.
    """
    changes: Counter[str] = Counter()
    largest = max(spec.page_size_bytes for spec in specs.values())
    paged = {name: spec for name, spec in specs.items() if spec.uses_slot_mapping}
    top = max((spec.page_size_bytes for spec in paged.values()), default=largest)
    if may_change_blocks and top < largest:
        scale = cdiv(largest, top)
        specs = _scale_blocks(specs, scale)
        largest = max(spec.page_size_bytes for spec in specs.values())
        changes[f"attention blocks enlarged {scale} times, to reach the state page"] = len(paged)
    unified: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        page = spec.page_size_bytes
        if page == largest:
            unified[name] = spec
        elif isinstance(spec, AttentionSpec):
            reached, factor = _reach_page(
                name, spec, largest, vllm_config, may_change_blocks, accepts_block
            )
            unified[name] = reached
            if factor > 1:
                changes[f"{spec.kind} blocks enlarged {factor} times, to equal pages"] += 1
            if factor * page < largest:
                changes[f"{spec.kind} pages padded from {factor * page} to {largest} bytes"] += 1
        elif isinstance(spec, MambaSpec):
            unified[name] = replace(spec, page_size_padded=largest)
            changes[f"{spec.kind} pages padded from {page} to {largest} bytes"] += 1
        else:
            raise ConfigError(f"{spec.where}the page of {type(spec).__name__} cannot be padded")
    return unified, tuple(f"{count} layers: {what}" for what, count in changes.items())


def _reach_page(
    name: str,
    spec: AttentionSpec,
    largest: int,
    vllm_config: VllmConfig,
    may_change_blocks: bool,
    accepts_block: Callable[[Specs], bool] | None,
) -> tuple[KVCacheSpec, int]:
    """The spec with a page of ``largest`` bytes, and the factor by which its block grew."""
    is_latent = isinstance(spec, MLAAttentionSpec | SlidingWindowMLASpec)
    page = spec.page_size_bytes
    choices: list[tuple[int, int, KVCacheSpec]] = []
    for factor in range(1, (largest // page if may_change_blocks else 1) + 1):
        grown = spec
        if factor > 1:
            grown = cast(AttentionSpec, spec.copy_with_new_block_size(spec.block_size * factor))
        if grown.page_size_bytes != largest:
            if is_latent or grown.page_size_bytes > largest:
                continue
            if factor > 1 and accepts_block is not None and not accepts_block({name: grown}):
                continue
            grown = replace(grown, page_size_padded=largest)
        choices.append((_blocks_held(grown, vllm_config)[1], factor, grown))
    if not choices:
        raise ConfigError(
            f"{spec.where}a latent page of {page} bytes cannot be padded to the {largest} of "
            "other layers: use a block-outermost layout (BLHNC)"
        )
    _, factor, chosen = min(choices, key=lambda choice: choice[:2])
    return chosen, factor


def promote_to_full(specs: Specs) -> dict[str, KVCacheSpec]:
    """Windowed and chunked layers keep every token, as without the hybrid manager.

    Raises:
        ConfigError: layers of other kinds remain.
    """
    promoted: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        shared = {
            field: getattr(spec, field)
            for field in AttentionSpec.__dataclass_fields__
            if field != "dtype_name" and hasattr(spec, field)
        }
        if isinstance(spec, SlidingWindowMLASpec):
            latent = ("cache_dtype_str", "alignment", "compress_ratio", "model_version")
            shared |= {field: getattr(spec, field) for field in latent}
            promoted[name] = MLAAttentionSpec(**shared, sliding_window=spec.sliding_window)
        elif isinstance(spec, SlidingWindowSpec):
            promoted[name] = FullAttentionSpec(**shared, sliding_window=spec.sliding_window)
        elif isinstance(spec, ChunkedLocalAttentionSpec):
            promoted[name] = FullAttentionSpec(
                **shared, attention_chunk_size=spec.attention_chunk_size
            )
        else:
            promoted[name] = spec
    if len(kinds_of(promoted)) > 1:
        kinds = ", ".join(sorted({spec.kind.value for spec in promoted.values()}))
        raise ConfigError(
            f"layers of kinds {kinds} need the hybrid KV cache manager: don't give "
            "--disable-hybrid-kv-cache-manager",
            parameter="disable_hybrid_kv_cache_manager",
        )
    return promoted
