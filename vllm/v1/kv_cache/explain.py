"""The plan as a report: data, tables of it for a terminal, a few lines of it for the log.

Answers what a user asks of a cache: how many tokens and requests fit, what a block and a token
cost, what is wasted where and what another rule would waste, why this layout, what moving a block
costs. Decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.grouping import COMPARED_REQUEST
from vllm.v1.kv_cache.resolver import LayoutPlan
from vllm.v1.kv_cache.runs import block_runs, regions

if TYPE_CHECKING:
    from rich.console import Group

    from vllm.config import VllmConfig

__all__ = [
    "CacheReport",
    "GroupReport",
    "LayerReport",
    "RejectedReport",
    "RequestReport",
    "build_report",
    "render_report",
    "summarize",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Layers that keep the same."""

    count: int
    kind: str
    content: str
    """Name of the format of the bytes."""
    dtype: str
    block_size: int
    """Tokens of a manager block."""
    num_heads: int
    num_states: int
    content_bytes: int
    """Of one (head slot, state)."""
    page_bytes: int
    """Room of one block, padding included."""
    padding_bytes: int
    example: str
    """Name of the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """Groups that are alike."""

    count: int
    """Groups of this kind and size."""
    kind: str
    num_layers: int
    """Layers of each."""
    block_size: int
    """Tokens of a manager block."""
    kernel_block_size: int
    payload_bytes: int
    """Bytes with content in a block that such a group owns."""
    wasted_bytes: int
    """The rest of the block."""
    intervals: int
    """Contiguous pieces of one block: descriptors that moving it takes."""
    head_intervals: int
    """The same for half of the heads, as for a peer with twice the tensor-parallel size."""
    blocks_per_request: int
    """Blocks that a request of the longest length holds, in each of these groups."""
    blocks_compared: int
    """Blocks that the compared request holds between two steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedReport:
    layout: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """One request between two steps: what it holds and what of that is read."""

    num_tokens: int
    held_bytes: int
    payload_bytes: int
    waste: float
    """1 - payload / held, 0 to 1; group slots and padding included."""
    equal_pages_held_bytes: int
    """What vLLM's rule (equal pages, groups of one size) would hold."""
    equal_pages_waste: float
    descriptors: int
    """Contiguous pieces of all its blocks: what a transfer of it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    layout: str
    reason: str
    backends: tuple[str, ...]
    num_blocks: int
    bytes_per_block: int
    pool_bytes: int
    num_regions: int
    """Stretches of memory that a transport registers."""
    max_model_len: int
    bytes_per_request: int
    """Of a request of max_model_len."""
    bytes_per_token: float
    """The same for each of its tokens."""
    max_concurrency: float
    """Requests of max_model_len that fit at once."""
    num_tokens: int
    """Tokens of such requests that fit at once."""
    wasted_share: float
    """Part of such a request's blocks that holds nothing, 0 to 1."""
    request: RequestReport
    """The request by which plans are compared."""
    layers: tuple[LayerReport, ...]
    groups: tuple[GroupReport, ...]
    notes: tuple[str, ...]
    rejected: tuple[RejectedReport, ...]
    fingerprint: str
    """Of the cache's descriptor."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def build_report(config: KVCacheConfig, vllm_config: VllmConfig) -> CacheReport:
    """Report on a plan that ``get_kv_cache_configs`` made.

    Raises:
        ConfigError: the config was not planned, or its model keeps nothing.
    """
    plan = config.explanation
    if not isinstance(plan, LayoutPlan):
        raise ConfigError("this model keeps no KV cache, so there is no plan to explain")
    groups = _report_groups(config, vllm_config)
    blocks = sum(group.count * group.blocks_per_request for group in groups)
    request = blocks * config.bytes_per_block
    wasted = sum(g.count * g.blocks_per_request * g.wasted_bytes for g in groups)
    max_model_len = vllm_config.model_config.max_model_len
    concurrency = (config.num_blocks - 1) / blocks
    return CacheReport(
        layout=config.kv_cache_layout.value,
        reason=plan.reason,
        backends=plan.backends,
        num_blocks=config.num_blocks,
        bytes_per_block=config.bytes_per_block,
        pool_bytes=config.backing_size_bytes,
        num_regions=len(regions(config)),
        max_model_len=max_model_len,
        bytes_per_request=request,
        bytes_per_token=request / max_model_len,
        max_concurrency=concurrency,
        num_tokens=int(concurrency * max_model_len),
        wasted_share=wasted / request,
        request=_report_request(config, plan, groups, vllm_config),
        layers=_report_layers(config),
        groups=groups,
        notes=plan.grouping.notes,
        rejected=tuple(
            RejectedReport(layout=item.layout.value, reason=item.reason) for item in plan.rejected
        ),
        fingerprint=describe(config).fingerprint(),
    )


def _report_groups(config: KVCacheConfig, vllm_config: VllmConfig) -> tuple[GroupReport, ...]:
    tokens = min(COMPARED_REQUEST, vllm_config.model_config.max_model_len)
    counted: Counter[tuple[Any, ...]] = Counter()
    for index, group in enumerate(config.kv_cache_groups):
        payload = sum(run.count * run.length for run in block_runs(config, index))
        spec = group.kv_cache_spec
        heads = {group.spec_of(name).num_heads_of_side for name in group.layer_names}
        # An odd number of heads has no half: then it is one head.
        part = (0, math.lcm(*heads) if any(count % 2 for count in heads) else 2)
        counted[
            spec.manager_spec.kind.value,
            len(group.layer_names),
            spec.block_size,
            config.kernel_block_size(index),
            payload,
            config.bytes_per_block - payload,
            _pieces(config, index),
            sum(run.count for run in block_runs(config, index, part=part)),
            spec.max_resident_blocks(vllm_config),
            spec.blocks_at(tokens, vllm_config),
        ] += 1
    names = tuple(GroupReport.__dataclass_fields__)[1:]
    return tuple(
        GroupReport(count=count, **dict(zip(names, values, strict=True)))
        for values, count in counted.items()
    )


def _pieces(config: KVCacheConfig, group_id: int) -> int:
    return sum(run.count for run in block_runs(config, group_id, bridge_gaps=True))


def _report_request(
    config: KVCacheConfig,
    plan: LayoutPlan,
    groups: tuple[GroupReport, ...],
    vllm_config: VllmConfig,
) -> RequestReport:
    tokens = min(COMPARED_REQUEST, vllm_config.model_config.max_model_len)
    payload = sum(
        group.spec_of(name).payload_bytes_at(tokens, vllm_config)
        for group in config.kv_cache_groups
        for name in group.layer_names
    )
    held = config.bytes_per_block * sum(g.count * g.blocks_compared for g in groups)
    equal = plan.compared_with_bytes
    return RequestReport(
        num_tokens=tokens,
        held_bytes=held,
        payload_bytes=payload,
        waste=1 - payload / held,
        equal_pages_held_bytes=equal,
        equal_pages_waste=1 - payload / equal,
        descriptors=sum(g.count * g.blocks_compared * g.intervals for g in groups),
    )


def _report_layers(config: KVCacheConfig) -> tuple[LayerReport, ...]:
    alike: dict[tuple[Any, ...], list[str]] = {}
    for group in config.kv_cache_groups:
        for name in group.layer_names:
            spec = group.spec_of(name)
            values = (
                spec.kind.value,
                spec.content_format.value,
                spec.storage_dtype,
                spec.block_size,
                spec.num_heads,
                spec.num_states,
                spec.state_content_size_bytes,
                spec.page_size_bytes,
                spec.page_size_bytes - spec.unpadded_page_size_bytes,
            )
            alike.setdefault(values, []).append(name)
    fields = tuple(LayerReport.__dataclass_fields__)[1:-1]
    return tuple(
        LayerReport(count=len(names), example=names[0], **dict(zip(fields, values, strict=True)))
        for values, names in alike.items()
    )


def summarize(report: CacheReport) -> list[str]:
    """The report in the few lines that a start-up logs."""
    groups = ", ".join(
        f"{group.count} x {group.num_layers} {group.kind} ({group.block_size} tokens)"
        for group in report.groups
    )
    request = report.request
    waste, equal = 100 * request.waste, 100 * request.equal_pages_waste
    return [
        f"KV cache size: {report.num_tokens:,} tokens ({report.num_blocks:,} blocks of "
        f"{report.bytes_per_block:,} bytes); maximum concurrency for {report.max_model_len:,} "
        f"tokens per request: {report.max_concurrency:.2f}x",
        f"KV cache layout {report.layout}: {report.reason}",
        f"KV cache groups: {groups}; {report.bytes_per_token:,.0f} bytes per token, "
        f"{report.num_regions} regions; unused memory in a request of {request.num_tokens:,} "
        f"tokens: {waste:.1f} % ({equal:.1f} % with equal pages)",
        *(f"KV cache: {note}" for note in report.notes),
    ]


def render_report(report: CacheReport) -> Group:
    """The report as tables of the library ``rich``."""
    from rich.console import Group

    return Group(*_render_facts(report), *_render_tables(report))


def _render_facts(report: CacheReport) -> list[Any]:
    from rich.table import Table

    request = report.request
    facts = Table(show_header=False, box=None)
    rows = {
        "layout": f"{report.layout} ({report.reason})",
        "backends": ", ".join(report.backends) or "any",
        "pool": f"{report.num_blocks:,} blocks of {report.bytes_per_block:,} bytes, "
        f"{report.pool_bytes / (1 << 30):.2f} GiB, in {report.num_regions} regions",
        "fits": f"{report.num_tokens:,} tokens; {report.max_concurrency:.1f} requests of "
        f"{report.max_model_len:,} tokens",
        "per request": f"{report.bytes_per_request:,} bytes for {report.max_model_len:,} tokens "
        f"({report.bytes_per_token:,.0f} a token)",
        "waste": f"{100 * request.waste:.2f} % of the {request.held_bytes:,} bytes that a request "
        f"of {request.num_tokens:,} tokens holds",
        "vLLM's rule": f"{100 * request.equal_pages_waste:.2f} % of "
        f"{request.equal_pages_held_bytes:,} bytes, with equal pages for all groups",
        "transfer": f"{report.num_regions} regions to register, {request.descriptors:,} "
        f"descriptors for the blocks of {request.num_tokens:,} tokens",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    for note in report.notes:
        facts.add_row("changed", note)
    return [facts]


_LAYER_COLUMNS = (
    ("layers", "count"),
    ("kind", "kind"),
    ("content", "content"),
    ("dtype", "dtype"),
    ("block tokens", "block_size"),
    ("heads", "num_heads"),
    ("states", "num_states"),
    ("content bytes", "content_bytes"),
    ("page bytes", "page_bytes"),
    ("padding", "padding_bytes"),
)
_GROUP_COLUMNS = (
    ("groups", "count"),
    ("kind", "kind"),
    ("layers", "num_layers"),
    ("block tokens", "block_size"),
    ("kernel reads", "kernel_block_size"),
    ("payload bytes", "payload_bytes"),
    ("wasted bytes", "wasted_bytes"),
    ("pieces to move", "intervals"),
    ("of half the heads", "head_intervals"),
    ("blocks a request", "blocks_per_request"),
)


def _render_tables(report: CacheReport) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    tables = []
    for title, columns, rows in (
        ("Layers", _LAYER_COLUMNS, report.layers),
        ("Groups (each has its own block table)", _GROUP_COLUMNS, report.groups),
    ):
        table = Table(title=title)
        for heading, name in columns:
            left = name in ("kind", "content", "dtype")
            table.add_column(heading, justify="left" if left else "right")
        for row in rows:
            values = (getattr(row, name) for _, name in columns)
            table.add_row(*(f"{v:,}" if isinstance(v, int) else v for v in values))
        tables.append(table)
    refused = Table(title="Layouts not taken")
    refused.add_column("layout")
    refused.add_column("why")
    for item in report.rejected:
        refused.add_row(item.layout, Text(item.reason))
    return [*tables, refused]
