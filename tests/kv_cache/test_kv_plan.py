"""``vllm kv-plan`` on the configurations of twelve models: figures, waste, time, refusals."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vllm.entrypoints.cli import kv_plan
from vllm.errors import CapacityError, ConfigError
from vllm.v1.kv_cache.explain import build_report

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))
UNIFORM = {"llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3", "falcon-mamba-7b"}
# Waste of a request of 8,192 tokens: at most, in percent. The first column is ours.
MIXED = {
    "deepseek-v4-like": 13.5,
    "gemma-3-27b": 2.3,
    "gpt-oss-20b": 0.1,
    "jamba-v0.1": 0.9,
    "lfm2-1.2b": 0.2,
    "minimax-text-01-like": 0.1,
    "nemotron-h-8b": 2.1,
    "qwen3-next-80b-a3b": 3.8,
}


def report(model, *options):
    args = kv_plan.make_parser().parse_args([str(CONFIGS / f"{model}.json"), *options])
    return build_report(*kv_plan.plan(args))


def test_there_is_a_configuration_of_each_model():
    assert set(MODELS) == UNIFORM | MIXED.keys()
    assert len(MODELS) == 12


@pytest.mark.parametrize("model", MODELS)
def test_waste_is_low_and_never_above_that_of_equal_pages(model):
    request = report(model).request
    assert request.num_tokens == 8192
    assert request.held_bytes <= request.equal_pages_held_bytes
    assert request.waste <= request.equal_pages_waste
    assert 0 <= request.waste == pytest.approx(1 - request.payload_bytes / request.held_bytes)
    assert 100 * request.waste <= (2.0 if model in UNIFORM else MIXED[model])


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_more_ranks_need_no_more_memory_each(model, tp_size):
    alone, shared = report(model), report(model, "-tp", str(tp_size))
    assert shared.request.held_bytes <= alone.request.held_bytes
    assert shared.request.held_bytes <= shared.request.equal_pages_held_bytes


def test_known_figures():
    llama = report("llama-3.1-8b")
    assert [(layer.count, layer.page_bytes) for layer in llama.layers] == [(32, 65_536)]
    assert llama.bytes_per_token == 131_072
    # The published block and page of Qwen3-Next, where layers are compact.
    compact = report("qwen3-next-80b-a3b", "--layout", "HND")
    assert {(layer.kind, layer.page_bytes) for layer in compact.layers} == {
        ("mamba", 1_114_112),
        ("full_attention", 1_114_112),
    }
    assert {g.block_size for g in compact.groups if g.kind == "full_attention"} == {544}
    assert next(layer.padding_bytes for layer in compact.layers if layer.kind == "mamba") == 16_384
    latent = report("deepseek-v3", "--kv-cache-dtype", "fp8_ds_mla")
    assert {layer.content_bytes for layer in latent.layers} == {656}


def test_packing_beats_padding_for_states():
    packed, padded = report("qwen3-next-80b-a3b"), report("qwen3-next-80b-a3b", "--layout", "HND")
    assert packed.layout == "BLHNC"
    assert all(layer.padding_bytes == 0 for layer in packed.layers)
    assert packed.request.held_bytes < padded.request.held_bytes


def test_tokens_requests_and_blocks_that_fit():
    result = report("llama-3.1-8b", "--memory", "16GiB", "--max-model-len", "8192")
    assert result.num_blocks == 8192
    assert result.max_concurrency == pytest.approx(8191 / 512)
    assert result.num_tokens == 8191 * 16
    with pytest.raises(CapacityError, match="--max-model-len to at most"):
        report("llama-3.1-8b", "--memory", "1GiB", "--max-model-len", "131072")
    # Without the option the longest request is what fits.
    assert report("llama-3.1-8b", "--memory", "1GiB").max_model_len == 511 * 16
    assert report("minimax-text-01-like").max_model_len < 10_240_000


def test_what_a_transfer_takes():
    at_rest = report("llama-3.1-8b")
    moving = report("llama-3.1-8b", "--connector", "Nixl")
    assert (at_rest.layout, at_rest.num_regions, at_rest.groups[0].intervals) == ("LBHNC", 32, 32)
    assert (moving.layout, moving.num_regions, moving.groups[0].intervals) == ("BHLNC", 1, 1)
    assert moving.groups[0].head_intervals == 1
    assert at_rest.request.descriptors == 32 * moving.request.descriptors == 32 * 512
    assert report("deepseek-v4-like", "--connector", "Nixl").num_regions == 1
    assert report("llama-3.1-8b", "--connector", "LMCache").layout == "LBHNC"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "XYZ"], "unknown KV cache layout 'XYZ'"),
        (["--connector", "Nixle"], "unknown; known: .*NixlConnector"),
        (["--kv-cache-dtype", "fp7"], "--kv-cache-dtype 'fp7' is unknown"),
        (["-tp", "3"], "neither divides the 8 KV heads"),
        (["--kv-cache-dtype", "fp8_ds_mla"], "for latent"),
    ],
)
def test_refusals_name_the_option(options, message):
    with pytest.raises(ConfigError, match=message):
        report("llama-3.1-8b", *options)


def test_unknown_models_and_fields(tmp_path):
    config = tmp_path / "other.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalML"], "hidden_size": 64}))
    args = kv_plan.make_parser().parse_args([str(config)])
    with pytest.raises(ConfigError, match=r"LlamaForCausalML .* known: .*LlamaForCausalLM"):
        kv_plan.plan(args)
    config.write_text(json.dumps({"architectures": ["JambaForCausalLM"], "hidden_size": 64}))
    with pytest.raises(ConfigError, match=r"config\.json has no attn_layer_period"):
        kv_plan.plan(args)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            "llama-3.1-8b",
            {"layer_types": ["foo"] * 32},
            "layer_types may be full_attention or sliding_attention .*, not foo",
        ),
        ("llama-3.1-8b", {"num_key_value_heads": -8}, "num_key_value_heads must be"),
        ("jamba-v0.1", {"attn_layer_period": 0}, "attn_layer_period must be .* at least 1"),
        ("nemotron-h-8b", {"hybrid_override_pattern": "XYZ"}, "names X, Y, Z; known: M"),
        ("nemotron-h-8b", {"hybrid_override_pattern": "M*"}, "names 2 layers, num_hidden_layers"),
        ("nemotron-h-8b", {"n_groups": 0}, "groups must be a whole number of at least 1"),
        ("nemotron-h-8b", {"hybrid_override_pattern": "-" * 52}, "keeps no KV cache"),
        ("falcon-mamba-7b", {"conv_kernel": 1}, "conv_kernel must be .* at least 2"),
        ("deepseek-v4-like", {"compress_ratios": [4]}, "names 1 layers"),
        ("gpt-oss-20b", {"sliding_window": 0}, "sliding_window must be"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused_by_field(
    model, changes, message, tmp_path
):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((CONFIGS / f"{model}.json").read_text()) | changes))
    args = kv_plan.make_parser().parse_args([str(config)])
    with pytest.raises(ConfigError, match=message):
        build_report(*kv_plan.plan(args))


@pytest.mark.parametrize("dtype", ["fp8", "int8_per_token_head", "nvfp4", "turboquant_4bit_nc"])
def test_smaller_formats_need_less(dtype):
    plain, small = report("qwen3-30b-a3b"), report("qwen3-30b-a3b", "--kv-cache-dtype", dtype)
    assert small.bytes_per_token < 0.6 * plain.bytes_per_token
    assert small.layers[0].dtype in ("uint8", "int8")


def test_layers_to_skip_are_layers_of_the_model():
    some = report("gemma-3-27b", "--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "5")
    assert {layer.dtype for layer in some.layers} == {"uint8", "bfloat16"}
    with pytest.raises(ConfigError, match="--kv-cache-dtype-skip-layers '99' means no layer"):
        report("gemma-3-27b", "--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "99")


def test_states_kept_for_prefix_reuse_stand_for_as_many_tokens_as_attention_blocks():
    result = report("nemotron-h-8b", "--mamba-cache-mode", "align")
    assert len({group.block_size for group in result.groups}) == 1


@pytest.mark.parametrize(
    ("model", "dtype", "size"),
    [
        ("minimax-text-01-like", "auto", 16),
        ("minimax-text-01-like", "auto", 64),
        ("qwen3-next-80b-a3b", "fp8", 16),
    ],
)
def test_a_block_size_that_would_waste_more_than_equal_pages_is_multiplied(model, dtype, size):
    result = report(model, "--block-size", str(size), "--kv-cache-dtype", dtype)
    assert result.request.held_bytes <= result.request.equal_pages_held_bytes
    blocks = {group.block_size for group in result.groups if group.kind == "full_attention"}
    assert all(block > size and block % size == 0 for block in blocks)
    assert any("--block-size multiplied" in note for note in result.notes)


@pytest.mark.parametrize("model", sorted({*MODELS} - {"deepseek-v4-like"}))
def test_else_it_is_kept(model):
    result = report(model, "--block-size", "32")
    if not any("--block-size multiplied" in note for note in result.notes):
        paged = [layer for layer in result.layers if layer.kind != "mamba"]
        assert {layer.block_size for layer in paged} <= {32}
    assert result.request.held_bytes <= result.request.equal_pages_held_bytes


def test_a_backend_limits_the_choice():
    result = report("llama-3.1-8b", "--attention-backend", "CPU_ATTN", "--block-size", "32")
    assert result.backends == ("CPU_ATTN",)


def run_python(code):
    """What it printed, and its seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, seconds


@pytest.fixture(scope="module")
def unit():
    """Processor time of a small program of the standard library; 50 to 60 ms where a second is
    the limit of the command."""
    return sorted(run_python("import argparse, dataclasses, json, typing")[1] for _ in range(5))[2]


@pytest.mark.parametrize("model", MODELS)
def test_the_command(model, unit):
    """Under a second of processor time, without torch; tables, waste and a picture."""
    code = (
        "import sys\nfrom vllm.entrypoints.cli.main import main\n"
        f"status = main(['kv-plan', {str(CONFIGS / model)!r} + '.json'])\n"
        "print(); print(status, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    printed, seconds = run_python(code)
    assert printed.splitlines()[-1] == "0 False False"
    assert seconds < 20 * unit
    for text in ("waste", "vLLM's rule", "Groups", "Layouts not taken", "One block of", "regions"):
        assert text in printed


def test_json(capsys):
    args = kv_plan.make_parser().parse_args([str(CONFIGS / "gpt-oss-20b.json"), "--json"])
    assert kv_plan.run(args) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["architecture"] == "GptOssForCausalLM"
    assert data["request"]["waste"] < 0.01
    assert len(data["fingerprint"]) == 64
