"""The plan as a report: data first, then tables of it for a terminal.

Answers what a user asks of a cache: how many tokens and requests fit, what a block and a token
cost, what is wasted where, why this layout, what moving a block costs. Decides nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.resolver import LayoutPlan
from vllm.v1.kv_cache.runs import block_runs, regions

if TYPE_CHECKING:
    from rich.console import Group

    from vllm.config import VllmConfig

__all__ = ["CacheReport", "GroupReport", "RejectedReport", "build_report", "render_report"]


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
    """Contiguous pieces of one block: copies that moving it takes."""
    blocks_per_request: int
    """Blocks that a request of the longest length holds, in each of these groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedReport:
    layout: str
    reason: str


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
    wasted_share: float
    """Part of such a request's blocks that holds nothing, 0 to 1."""
    groups: tuple[GroupReport, ...]
    notes: tuple[str, ...]
    rejected: tuple[RejectedReport, ...]

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
    counted: Counter[tuple[Any, ...]] = Counter()
    for index, group in enumerate(config.kv_cache_groups):
        runs = block_runs(config, index)
        payload = sum(run.count * run.length for run in runs)
        spec = group.kv_cache_spec
        counted[
            spec.manager_spec.kind.value,
            len(group.layer_names),
            spec.block_size,
            config.kernel_block_size(index),
            payload,
            config.bytes_per_block - payload,
            sum(run.count for run in block_runs(config, index, bridge_gaps=True)),
            spec.max_resident_blocks(vllm_config),
        ] += 1
    names = tuple(GroupReport.__dataclass_fields__)[1:]
    groups = tuple(
        GroupReport(count=count, **dict(zip(names, values, strict=True)))
        for values, count in counted.items()
    )
    blocks = sum(group.count * group.blocks_per_request for group in groups)
    request = blocks * config.bytes_per_block
    wasted = sum(g.count * g.blocks_per_request * g.wasted_bytes for g in groups)
    max_model_len = vllm_config.model_config.max_model_len
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
        max_concurrency=(config.num_blocks - 1) / blocks,
        wasted_share=wasted / request,
        groups=groups,
        notes=plan.grouping.notes,
        rejected=tuple(
            RejectedReport(layout=item.layout.value, reason=item.reason) for item in plan.rejected
        ),
    )


def render_report(report: CacheReport) -> Group:
    """The report as tables of the library ``rich``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(show_header=False, box=None)
    rows = {
        "layout": f"{report.layout} ({report.reason})",
        "backends": ", ".join(report.backends) or "any",
        "pool": f"{report.num_blocks:,} blocks of {report.bytes_per_block:,} bytes, "
        f"{report.pool_bytes / (1 << 30):.2f} GiB, in {report.num_regions} regions",
        "per request": f"{report.bytes_per_request:,} bytes for {report.max_model_len:,} tokens "
        f"({report.bytes_per_token:,.0f} a token); {report.max_concurrency:.1f} such requests fit",
        "waste": f"{100 * report.wasted_share:.1f} % of such a request's blocks",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    for note in report.notes:
        facts.add_row("changed", note)

    groups = Table(title="Groups (each has its own block table)")
    for heading in (
        "groups",
        "kind",
        "layers",
        "block tokens",
        "kernel reads",
        "payload bytes",
        "wasted bytes",
        "pieces to move",
        "blocks a request",
    ):
        groups.add_column(heading, justify="left" if heading == "kind" else "right")
    for group in report.groups:
        groups.add_row(
            str(group.count),
            group.kind,
            str(group.num_layers),
            f"{group.block_size:,}",
            f"{group.kernel_block_size:,}",
            f"{group.payload_bytes:,}",
            f"{group.wasted_bytes:,}",
            str(group.intervals),
            f"{group.blocks_per_request:,}",
        )
    refused = Table(title="Layouts not taken")
    refused.add_column("layout")
    refused.add_column("why")
    for item in report.rejected:
        refused.add_row(item.layout, Text(item.reason))
    return Group(facts, groups, refused)
