"""Chooses layout, grouping and kernel block sizes together, and can say why.

Owns the one decision that engine, workers and connectors share. It is made once, before any
memory is taken, from declarations alone: what the layers keep, what their backends can read, what
the user and the connector asked for. Pure; knows no tensors, no backends' classes, no devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import MultipleOf
from vllm.v1.kv_cache.equal_pages import plan_with_equal_pages
from vllm.v1.kv_cache.grouping import (
    COMPARED_REQUEST,
    Grouping,
    group_packed,
    group_with_equal_pages,
    promote_to_full,
)
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "BackendConstraints",
    "CacheMovement",
    "LayoutPlan",
    "RejectedLayout",
    "resolve_layout",
    "select_common_block_size",
]

L = KVCacheLayout
_ORDER_AT_REST = (L.LBHNC, L.LBNHC, L.BLHNC, L.BLNHC, L.BHLNC, L.LHBNC)
# About 4 us a descriptor whatever its size: one run a block, and one a head range, comes first.
_ORDER_MOVING = (L.BHLNC, L.BLHNC, L.LBHNC, L.BLNHC, L.LBNHC, L.LHBNC)
# A layout later in the order must save more than 1 % of memory to be taken before one earlier.
_WORTH_MOVING = 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConstraints:
    """What the backend of one layer can read."""

    backend: str
    layouts: tuple[KVCacheLayout, ...] | None = None
    """None: any."""
    kernel_block_sizes: tuple[int | MultipleOf, ...] = (MultipleOf(1),)

    def accepts_block(self, size: int) -> bool:
        return any(
            option.accepts(size) if isinstance(option, MultipleOf) else option == size
            for option in self.kernel_block_sizes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMovement:
    """What carries blocks out of this cache, if anything does."""

    connector: str
    """Name of the connector or offloader, for messages."""
    layout: KVCacheLayout | None = None
    """The layout that it states; then that one or none."""
    takes_descriptors: bool = False
    """It moves byte runs of the descriptors, in whatever layout (all of ours do)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedLayout:
    layout: KVCacheLayout
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """What was decided for all workers, and why."""

    layout: KVCacheLayout
    grouping: Grouping
    kernel_block_sizes: tuple[int, ...]
    """Tokens of a kernel block, for each group."""
    reason: str
    rejected: tuple[RejectedLayout, ...] = ()
    backends: tuple[str, ...] = ()
    compared_with_bytes: int = 0
    """What the rule of equal pages holds for the request of ``grouping.compared_bytes``."""

    def explain(self) -> str:
        """The decision in lines of text; ``explain.py`` makes tables of it."""
        lines = [f"KV cache layout {self.layout}: {self.reason}"]
        grouping = self.grouping
        for group, kernel in zip(grouping.groups, self.kernel_block_sizes, strict=True):
            spec = group.spec
            payload = sum(
                grouping.specs[name].unpadded_page_size_bytes for name in group.layer_names
            )
            waste = grouping.bytes_per_block - payload
            lines.append(
                f"  {len(group.layer_names)} x {spec.manager_spec.kind.value}: blocks of "
                f"{spec.block_size} tokens (kernels read {kernel}), {payload} bytes a block, "
                f"{waste} wasted ({100 * waste / grouping.bytes_per_block:.1f} %)"
            )
        lines.extend(f"  {note}" for note in grouping.notes)
        lines.append(f"  {grouping.bytes_per_block} bytes a block")
        lines.extend(f"  not {item.layout}: {item.reason}" for item in self.rejected)
        return "\n".join(lines)


def select_common_block_size(
    manager_block_size: int, constraints: Iterable[BackendConstraints]
) -> int:
    """Tokens of the block that all these backends read.

    The manager's size where every backend accepts it, else the largest size that a backend names,
    all accept, and the manager's is a multiple of.

    Raises:
        ConfigError: there is none.
    """
    backends = list(constraints)
    if all(backend.accepts_block(manager_block_size) for backend in backends):
        return manager_block_size
    named = {
        option
        for backend in backends
        for option in backend.kernel_block_sizes
        if isinstance(option, int) and manager_block_size % option == 0
    }
    common = [size for size in named if all(backend.accepts_block(size) for backend in backends)]
    if not common:
        wants = "; ".join(
            sorted({f"{b.backend} {_sizes_text(b.kernel_block_sizes)}" for b in backends})
        )
        raise ConfigError(
            f"no kernel block size for blocks of {manager_block_size} tokens: choose a "
            f"--block-size that all backends accept ({wants})",
            parameter="block_size",
            value=manager_block_size,
        )
    return max(common)


def _sizes_text(options: Sequence[int | MultipleOf]) -> str:
    return ", ".join(
        f"multiples of {o.base}" if isinstance(o, MultipleOf) else str(o) for o in options
    )


def resolve_layout(
    specs: Mapping[str, KVCacheSpec],
    vllm_config: VllmConfig,
    constraints: Mapping[str, BackendConstraints] | None = None,
    movement: CacheMovement | None = None,
) -> LayoutPlan:
    """Decide for all layers of all workers.

    A layout that the user names (VLLM_KV_CACHE_LAYOUT) or a connector states is taken or refused;
    else the first of the default order that works and needs no more memory than a later one.

    Args:
        specs: layer name -> spec, every layer of the model that keeps anything.
        constraints: layer name -> what its backend reads; a layer left out reads everything.
        movement: what moves blocks, None where nothing does.

    Raises:
        ConfigError: no layout works, or not the one that was asked for; says why each was not.
    """
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        specs = promote_to_full(specs)
    limits = dict(constraints or {})
    order = _ORDER_MOVING if movement and movement.takes_descriptors else _ORDER_AT_REST
    possible: dict[KVCacheLayout, tuple[Grouping, tuple[int, ...]]] = {}
    rejected: list[RejectedLayout] = []
    yardstick = plan_with_equal_pages(specs, vllm_config)
    ceiling = yardstick.held_bytes(
        min(COMPARED_REQUEST, vllm_config.model_config.max_model_len), vllm_config
    )
    groupings = _Groupings(specs, vllm_config, limits, ceiling)
    for layout in order:
        try:
            possible[layout] = _try_layout(layout, specs, limits, groupings)
        except ConfigError as error:
            rejected.append(RejectedLayout(layout=layout, reason=str(error)))
    layout, reason = _choose(order, possible, rejected, vllm_config, movement, ceiling)
    grouping, kernel_block_sizes = possible[layout]
    return LayoutPlan(
        layout=layout,
        grouping=grouping,
        kernel_block_sizes=kernel_block_sizes,
        reason=reason,
        rejected=tuple(rejected),
        backends=tuple(sorted({limit.backend for limit in limits.values()})),
        compared_with_bytes=ceiling,
    )


class _Groupings:
    """The grouping of packed blocks and that of equal pages, each made once for all layouts."""

    def __init__(
        self,
        specs: Mapping[str, KVCacheSpec],
        vllm_config: VllmConfig,
        constraints: Mapping[str, BackendConstraints],
        ceiling: int,
    ) -> None:
        self._arguments = (specs, vllm_config, ceiling)
        self._constraints = constraints
        self._made: dict[bool, Grouping | ConfigError] = {}

    def under(self, layout: KVCacheLayout) -> Grouping:
        """Raises ConfigError where the pages cannot be grouped."""
        packed = layout.is_block_outermost
        if packed not in self._made:
            try:
                self._made[packed] = self._make(packed)
            except ConfigError as error:
                self._made[packed] = error
        made = self._made[packed]
        if isinstance(made, ConfigError):
            raise made
        return made

    def _make(self, packed: bool) -> Grouping:
        """With the user's block size, unless that holds more than equal pages for all groups."""
        specs, vllm_config, ceiling = self._arguments
        if not vllm_config.cache_config.user_specified_block_size:
            return self._group(packed, True)
        kept = self._group(packed, False)
        if kept.is_below(ceiling) or all(spec.uses_slot_mapping for spec in specs.values()):
            return kept
        grown = self._group(packed, True)
        if not grown.is_below(ceiling):
            return kept
        times = kept.compared_bytes / ceiling
        note = f"--block-size multiplied: as it is, a request would hold {times:.1f} times as much"
        return replace(grown, notes=(*grown.notes, note))

    def _group(self, packed: bool, may_change: bool) -> Grouping:
        specs, vllm_config, ceiling = self._arguments
        if packed:
            accepts = self._accepts if may_change else None
            return group_packed(specs, vllm_config, accepts, ceiling)
        return group_with_equal_pages(specs, vllm_config, may_change, self._accepts, ceiling)

    def _accepts(self, scaled: Mapping[str, KVCacheSpec]) -> bool:
        return all(
            self._constraints[name].accepts_block(spec.block_size)
            for name, spec in scaled.items()
            if name in self._constraints and spec.uses_slot_mapping
        )


def _try_layout(
    layout: KVCacheLayout,
    specs: Mapping[str, KVCacheSpec],
    constraints: Mapping[str, BackendConstraints],
    groupings: _Groupings,
) -> tuple[Grouping, tuple[int, ...]]:
    """Grouping and kernel block sizes under this layout, or ConfigError with the reason."""
    for limit in constraints.values():
        if limit.layouts is not None and layout not in limit.layouts:
            reads = ", ".join(limit.layouts)
            raise ConfigError(f"backend {limit.backend} reads only {reads}")
    for spec in specs.values():
        if spec.needs_block_contiguous and not layout.is_block_contiguous:
            raise ConfigError(
                f"{spec.where}{spec.content_format} keeps scales apart from data, so a page must "
                "be one run in order H, N, C"
            )
    grouping = groupings.under(layout)
    if not layout.is_block_compact:
        _check_page_apart(layout, grouping.specs)
    return grouping, _kernel_block_sizes(layout, grouping, constraints)


def _check_page_apart(layout: KVCacheLayout, specs: Mapping[str, KVCacheSpec]) -> None:
    """Heads lie outside the page: then all pages must be cut alike, and none padded."""
    shapes = {(s.num_heads, s.num_states, s.state_content_size_bytes) for s in specs.values()}
    if len(shapes) > 1:
        raise ConfigError(
            f"layers differ in (heads, states, content bytes) {sorted(shapes)}, and {layout} does "
            "not keep a page together"
        )
    for spec in specs.values():
        dense = spec.num_heads * spec.num_states * spec.state_content_size_bytes
        if spec.num_heads > 1 and spec.page_size_bytes != dense:
            raise ConfigError(
                f"{spec.where}page is padded from {dense} to {spec.page_size_bytes} bytes, and "
                f"{layout} does not keep a page together"
            )


def _kernel_block_sizes(
    layout: KVCacheLayout, grouping: Grouping, constraints: Mapping[str, BackendConstraints]
) -> tuple[int, ...]:
    sizes = []
    for group in grouping.groups:
        block_size = group.spec.block_size
        paged = [name for name in group.layer_names if grouping.specs[name].uses_slot_mapping]
        limits = [constraints[name] for name in paged if name in constraints]
        kernel = select_common_block_size(block_size, limits)
        if kernel != block_size:
            for name in paged:
                _check_split(layout, name, grouping, block_size, kernel)
        sizes.append(kernel)
    return tuple(sizes)


def _check_split(
    layout: KVCacheLayout, name: str, grouping: Grouping, block_size: int, kernel: int
) -> None:
    spec = grouping.specs[name]
    spec.get_num_kernel_states(kernel)
    dense = spec.num_heads * spec.num_states * spec.state_content_size_bytes
    if layout.is_block_outermost:
        problem = f"{layout} puts other layers' pages between two blocks"
    elif not layout.is_block_compact and spec.num_heads > 1:
        problem = f"{layout} does not keep a page together"
    elif spec.page_size_bytes != dense:
        problem = f"its page is padded from {dense} to {spec.page_size_bytes} bytes"
    else:
        return
    raise ConfigError(
        f"layer {name}: blocks of {block_size} tokens would be split into {block_size // kernel} "
        f"kernel blocks of {kernel}, but {problem}: use --block-size {kernel} or a layer-compact "
        "layout without padding"
    )


def _choose(
    order: Sequence[KVCacheLayout],
    possible: Mapping[KVCacheLayout, tuple[Grouping, tuple[int, ...]]],
    rejected: list[RejectedLayout],
    vllm_config: VllmConfig,
    movement: CacheMovement | None,
    ceiling: int,
) -> tuple[KVCacheLayout, str]:
    asked = vllm_config.cache_config.kv_cache_layout
    reasons = {item.layout: item.reason for item in rejected}
    works = ", ".join(possible) or "none"
    if not possible:
        why = "; ".join(f"{layout}: {reason}" for layout, reason in reasons.items())
        raise ConfigError(f"no KV cache layout serves this model: {why}")
    stated = movement.layout if movement else None
    if asked is not None:
        layout = KVCacheLayout.from_str(asked)
        if layout in reasons:
            raise ConfigError(
                f"VLLM_KV_CACHE_LAYOUT={asked} cannot be used: {reasons[layout]}; what works: "
                f"{works}",
                parameter="VLLM_KV_CACHE_LAYOUT",
                value=asked,
            )
        if movement is not None and stated not in (None, layout):
            raise ConfigError(
                f"VLLM_KV_CACHE_LAYOUT={asked} contradicts connector {movement.connector}, which "
                f"needs {stated}: unset it or set it to {stated}",
                parameter="VLLM_KV_CACHE_LAYOUT",
                value=asked,
            )
        _reject_rest(possible, layout, rejected, "VLLM_KV_CACHE_LAYOUT asks for another")
        return layout, f"VLLM_KV_CACHE_LAYOUT={asked} asks for it"
    if movement is not None and stated is not None:
        if stated in reasons:
            raise ConfigError(
                f"connector {movement.connector} needs KV cache layout {stated}, which cannot be "
                f"used: {reasons[stated]}; what works: {works}"
            )
        _reject_rest(possible, stated, rejected, f"connector {movement.connector} needs another")
        return stated, f"connector {movement.connector} needs it"
    cost = {layout: grouping.bytes_of_mix for layout, (grouping, _) in possible.items()}
    below = [name for name in possible if possible[name][0].is_below(ceiling)] or list(possible)
    least = min(cost[name] for name in below)
    lean = [name for name in order if name in below and cost[name] <= least * _WORTH_MOVING]
    layout = min(lean, key=lambda name: possible[name][0].rank)
    for name in possible:
        if name not in lean:
            more = 100 * (cost[name] / cost[layout] - 1)
            reason = f"needs {more:.1f} % more memory"
            if name not in below:
                reason = "a request would hold more than with equal pages for all groups"
            rejected.append(RejectedLayout(layout=name, reason=reason))
        elif possible[name][0].rank > possible[layout][0].rank:
            notes = "; ".join(possible[name][0].notes) or "many groups"
            rejected.append(RejectedLayout(layout=name, reason=f"would change the layers: {notes}"))
    _reject_rest(possible, layout, rejected, "later in the order of preference")
    if movement is not None and movement.takes_descriptors:
        return layout, f"{movement.connector} moves blocks, and it takes the fewest runs"
    return layout, "needs the least memory, and keeps the pages of layers as declared"


def _reject_rest(
    possible: Iterable[KVCacheLayout],
    chosen: KVCacheLayout,
    rejected: list[RejectedLayout],
    reason: str,
) -> None:
    seen = {str(item.layout) for item in rejected} | {str(chosen)}
    rejected.extend(
        [RejectedLayout(layout=name, reason=reason) for name in possible if name not in seen]
    )
