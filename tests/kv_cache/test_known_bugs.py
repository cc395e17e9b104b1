"""Rules against failures that other engines had, where no other test has the rule for its subject.

docs/kv_cache.md lists every known failure with the test that keeps it away; a test here checks
that those tests exist.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

from tests.kv_cache.helpers import full, make_config, mamba, placed, sliding
from vllm.config import set_current_vllm_config
from vllm.errors import ConfigError
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import content_differences, describe
from vllm.v1.kv_cache.pack import zero_states_from
from vllm.v1.kv_cache.runs import block_runs, regions
from vllm.v1.kv_cache.views import (
    canonicalize_singleton_dim_strides,
    part_views,
    shares_storage,
    split_kv,
)
from vllm.v1.kv_cache_interface import KVQuantMode
from vllm.v1.kv_cache_layout import KVCacheLayout

ROOT = Path(__file__).parents[2]
# Where caches are read and written; elsewhere nobody has one.
CACHE_CODE = [
    *(ROOT / "vllm/v1/attention").rglob("*.py"),
    *(ROOT / "vllm/v1/kv_cache").glob("*.py"),
    *(ROOT / "vllm/v1/worker").rglob("*.py"),
    *(ROOT / "vllm/model_executor/layers/attention").glob("*.py"),
    *(ROOT / "vllm/model_executor/layers/mamba").glob("*.py"),
    *(ROOT / "vllm/distributed/kv_transfer").rglob("*.py"),
]


def subject_of(node: ast.expr) -> str:
    """The names that a chain of attributes, indices and calls goes through; no arguments."""
    if isinstance(node, ast.Attribute):
        return f"{subject_of(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return subject_of(node.value)
    if isinstance(node, ast.Call):
        return subject_of(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def hidden_copies(source: str) -> list[str]:
    """Calls that may copy what is called a cache, a page or a state without saying so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            subject = subject_of(node.func.value)
            copies = node.func.attr in ("contiguous", "reshape", "flatten", "ravel")
            flat = node.func.attr == "view" and [ast.unparse(a) for a in node.args] == ["-1"]
            if (copies or flat) and re.search(r"cache|\bpages?\b|conv_state|ssm_state", subject):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", CACHE_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_cache_is_copied_behind_a_view(path):
    assert not hidden_copies(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "kv_cache.contiguous()",
        "key_cache[0].reshape(3, 4)",
        "self.kv_cache.view(-1)",
        "self.layers[0].kv_cache.transpose(1, 2)[0].flatten(1)",
        "self.ssm_state.float().contiguous()",
    ],
)
def test_a_hidden_copy_is_noticed(line):
    assert hidden_copies(f"def f(self, kv_cache, key_cache):\n    return {line}\n")


def test_what_is_computed_from_a_cache_may_be_copied():
    assert not hidden_copies("y = scan(x, self.ssm_state, kv_cache[0]).flatten(1)\n")


@pytest.mark.parametrize("name", [member.name for member in AttentionBackendEnum])
def test_no_backend_decides_about_bytes(name):
    """Shape and order come from spec and layout; a backend may only choose its packing."""
    backend = AttentionBackendEnum[name].get_class()
    for method in ("get_kv_cache_shape", "get_kv_cache_stride_order", "get_kv_cache_block_dim"):
        assert getattr(backend, method).__func__ is getattr(AttentionBackend, method).__func__


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_scales_of_a_padded_page_lie_where_the_tensor_says(layout):
    """K, its scale, V and its scale, of a page whose rows a product of shape entries would miss."""
    spec = full(
        3, 8, 4, "int8", kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD, page_size_padded=304
    )
    assert spec.page_size_bytes % spec.state_content_size_bytes
    cache = allocate_kv_cache(placed([{"l.0": spec, "l.1": spec}], KVCacheLayout(layout), 3))
    view = cache["l.1"]
    parts = part_views(view, spec.content_parts)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == {
        "k": ((3, 3, 4, 8), torch.int8),
        "k_scale": ((3, 3, 4, 1), torch.float32),
        "v": ((3, 3, 4, 8), torch.int8),
        "v_scale": ((3, 3, 4, 1), torch.float32),
    }
    assert shares_storage([cache.backing, *parts.values()])
    parts["v_scale"][2, 1, 3] = 0.5
    assert view[2, 1, 3, 20:24].clone().view(torch.float32).item() == 0.5
    assert int(torch.count_nonzero(cache.backing)) == 1
    with pytest.raises(ConfigError, match="do not make up 24 bytes"):
        part_views(view, [("k", 8)])


@pytest.mark.parametrize("layout", KVCacheLayout)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_the_tail_of_a_block_is_cleared_by_tokens_not_by_heads(layout, heads):
    spec = full(heads, 4, 4)
    cache = allocate_kv_cache(placed([{"l.0": spec, "l.1": spec}], layout, 3))
    for view in cache.values():
        view.fill_(1.0)
    zero_states_from(cache["l.1"], 2, 1)
    assert cache["l.0"].all()
    assert cache["l.1"][:2].all()
    assert cache["l.1"][2, :, :1].all()
    assert not cache["l.1"][2, :, 1:].any()


def test_k_heads_then_v_heads_is_a_view_of_two_sides():
    """Kernels that need K apart from V get them without a copy; axes of one keep dense strides."""
    heads, width = 1, 8
    spec = full(heads, width, 4, num_head_slots=2 * heads, state_content_bytes=width * 4)
    view = allocate_kv_cache(placed([{"l.0": spec}], KVCacheLayout.LBHNC, 3))["l.0"]
    sides = view.view(3, 2, heads, 4, width)
    key, value = sides.unbind(1)
    assert shares_storage([view, key, value])
    assert key.is_contiguous() is False
    assert key[0].is_contiguous()
    odd = key.as_strided(key.shape, (2 * 4 * width, 7, width, 1))
    canonical = canonicalize_singleton_dim_strides(odd)
    assert canonical.stride() == (2 * 4 * width, 4 * width, width, 1)
    assert canonical.data_ptr() == key.data_ptr()


def test_regions_do_not_tell_the_page():
    """Overlaid groups, padding and packing: only the descriptor knows how long a page is."""
    groups = [{"l.0": full(3, 4, 4), "l.1": full(3, 4, 4)}, {"l.2": sliding(1, 4, 8, 4)}]
    config = placed(groups, KVCacheLayout.BLHNC, 5)
    (region,) = regions(config)
    layers = {layer.name: layer for layer in describe(config).layers}
    guess = region.size_bytes // config.num_blocks
    assert {layer.span_bytes for layer in layers.values()} == {384, 128}
    assert guess not in {layer.span_bytes for layer in layers.values()}
    assert all(
        sum(r.length * r.count for r in layer.runs) == layer.span_bytes for layer in layers.values()
    )


def test_one_region_is_not_one_latent_and_not_one_copy_for_all_ranks():
    """Three facts that look alike from outside are told apart: regions, format, head axis."""
    attention = describe(placed([{"l.0": full()}], KVCacheLayout.BHLNC, 3))
    assert len(regions(placed([{"l.0": full()}], KVCacheLayout.BHLNC, 3))) == 1
    assert attention.layers[0].content_format == "kv_per_token"
    assert attention.layers[0].head_axis is not None


def test_caches_of_one_shape_and_two_meanings_are_told_apart():
    """K and V beside each other, or on two sides: the same bytes in number, not in meaning."""
    together = full(2, 4, 4)
    apart = full(1, 8, 4, num_head_slots=2, state_content_bytes=32)
    caches = [placed([{"l.0": spec}], KVCacheLayout.LBHNC, 3) for spec in (together, apart)]
    shapes = {tuple(allocate_kv_cache(cache)["l.0"].shape) for cache in caches}
    assert len(shapes) == 1
    differences = content_differences(*map(describe, caches))
    assert any("content_format" in text for text in differences)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_state_layer_is_moved_by_its_whole_page(num_blocks):
    """Not by its first state alone, and with two blocks not as a pair of states."""
    config = placed([{"l.0": mamba()}], KVCacheLayout.LBHNC, num_blocks)
    (run,) = block_runs(config, 0)
    assert (run.length, run.count) == (80, 1)
    assert [r.size_bytes for r in regions(config)] == [80 * num_blocks]
    assert [state.offset for state in describe(config).layers[0].states] == [0, 48]


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "BHLNC", "LBNHC"])
def test_a_forward_pass_allocates_nothing_of_the_caches_size(layout):
    """K and V are read where they lie: no pass may make a copy of them."""
    num_blocks, heads, width, tokens = 256, 2, 64, 4
    base = make_config(cache_dtype="auto", block_size=32)
    with set_current_vllm_config(base):
        layer = Attention(4, width, 0.1, heads, prefix="model.0.attn")
    spec = full(heads, width, 32, "bfloat16")
    config = placed(
        [{"model.0.attn": spec, "model.1.attn": spec}], KVCacheLayout(layout), num_blocks
    )
    cache = allocate_kv_cache(config)
    layer.bind_kv_cache(cache["model.0.attn"])
    lengths = torch.full((tokens,), 1900, dtype=torch.int32)
    table = torch.arange(1, 1 + 60 * tokens, dtype=torch.int32).view(tokens, 60)
    starts = torch.arange(tokens + 1, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        num_computed_tokens_cpu=lengths - 1,
        num_reqs=tokens,
        num_actual_tokens=tokens,
        max_query_len=1,
        max_seq_len=1900,
        block_table_tensor=table,
        slot_mapping=table[:, 59].long() * 32 + 11,
    )
    backend = layer.get_attn_backend()
    builder = backend.get_builder_cls()(spec, ["model.0.attn"], base, torch.device("cpu"))
    context = ForwardContext({"model.0.attn": builder.build(0, common)}, {"model.0.attn": layer})
    query = torch.randn(tokens, 4 * width, dtype=torch.bfloat16)
    key, value = torch.randn(2, tokens, heads * width, dtype=torch.bfloat16)
    with (
        torch.profiler.profile(profile_memory=True) as profile,
        set_forward_context(context),
        torch.inference_mode(),
    ):
        layer(query, key, value)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    read = tokens * 1900 * spec.page_size_bytes // 32
    assert allocated < read / 8
    stored, _ = split_kv(cache["model.0.attn"], width)
    assert torch.equal(stored[60, 11].flatten(), key[0])


def listed_failures() -> dict[str, list[str]]:
    """Number of each known failure -> the tests that docs/kv_cache.md names for it."""
    text = (ROOT / "docs/kv_cache.md").read_text()
    rows = re.findall(r"^\| (8\.\d+) \|(.*)\|$", text, re.MULTILINE)
    return {number: re.findall(r"tests/[\w/]+\.py::\w+", row) for number, row in rows}


def test_every_known_failure_has_a_test_or_a_reason():
    listed = listed_failures()
    assert set(listed) == {f"8.{number}" for number in range(1, 51)}
    text = (ROOT / "docs/kv_cache.md").read_text()
    for number, tests in listed.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {number} |"))
        assert tests or "does not apply: " in row, number
    assert sum(map(bool, listed.values())) >= 35


@pytest.mark.parametrize("number", [f"8.{number}" for number in range(1, 51)])
def test_the_tests_that_the_documentation_names_exist(number):
    for name in listed_failures()[number]:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            name
        )
