"""The report counts what the plan costs."""

import io
import json

import pytest
from rich.console import Console

from tests.kv_cache.helpers import full, make_config, mamba, sliding
from tests.kv_cache.test_grouping import hybrid
from vllm.errors import ConfigError
from vllm.v1.kv_cache.explain import build_report, render_report
from vllm.v1.kv_cache.planner import plan_kv_cache
from vllm.v1.kv_cache.resolver import BackendConstraints, CacheMovement
from vllm.v1.kv_cache_interface import KVCacheConfig


def test_one_kind():
    vllm_config = make_config(max_model_len=256)
    config = plan_kv_cache(vllm_config, {f"l.{i}": full() for i in range(4)}, 101 * 4096)
    report = build_report(config, vllm_config)
    assert report.bytes_per_request == 16 * 4096
    assert report.bytes_per_token == 256
    assert report.max_concurrency == 100 / 16
    assert (report.wasted_share, report.num_regions) == (0, 4)
    (group,) = report.groups
    assert (group.count, group.num_layers, group.intervals) == (1, 4, 4)


def test_what_a_block_costs_to_move():
    movement = CacheMovement(connector="X", takes_descriptors=True)
    vllm_config = make_config(max_model_len=256)
    specs = {f"l.{i}": full() for i in range(4)}
    config = plan_kv_cache(vllm_config, specs, 101 * 4096, None, movement)
    report = build_report(config, vllm_config)
    assert (report.layout, report.num_regions, report.groups[0].intervals) == ("BHLNC", 1, 1)


def test_waste_is_counted():
    """Kernels that read blocks of one token, beside a large state."""
    vllm_config = make_config(max_model_len=4096, kv_cache_layout="BLHNC")
    specs = {"l.0": full(1, 1, 1, "int8"), "l.1": mamba(page_size_padded=16_000)}
    limits = {"l.0": BackendConstraints(backend="X", kernel_block_sizes=(1,))}
    report = build_report(plan_kv_cache(vllm_config, specs, 1 << 27, limits), vllm_config)
    assert report.bytes_per_block == 16_000
    wasted = {group.kind: group.wasted_bytes for group in report.groups}
    assert wasted == {"full_attention": 15_998, "mamba": 16_000 - 80}
    assert 0.99 < report.wasted_share < 1


def test_as_json_and_as_tables():
    vllm_config = make_config(max_model_len=8192)
    config = plan_kv_cache(vllm_config, hybrid(12, 6, full(), sliding()), 1 << 27)
    report = build_report(config, vllm_config)
    assert json.loads(json.dumps(report.to_dict()))["groups"][0]["kind"] == "sliding_window"
    assert sum(group.count * group.num_layers for group in report.groups) == 12
    screen = io.StringIO()
    Console(width=160, file=screen).print(render_report(report))
    text = screen.getvalue()
    assert "sliding_window" in text
    assert "Layouts not taken" in text
    assert f"{report.num_blocks:,} blocks" in text


def test_a_model_without_caches_has_no_plan():
    with pytest.raises(ConfigError, match="keeps no KV cache"):
        build_report(KVCacheConfig(1, [], []), make_config())
