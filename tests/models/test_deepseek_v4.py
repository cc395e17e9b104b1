"""DeepSeek V4 generates what transformers generates, out of caches packed side by side in blocks.

Windows, compressed latents, index keys and compressors' states have blocks of 4 to 256 tokens, so
only the engine, with the planner's groups, can run it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import make_config
from tests.models.parity import (
    Generated,
    assert_equals_transformers,
    assert_same,
    engine,
    generate,
    make_prompts,
    metric,
)
from tests.models.test_linear import seen_from
from vllm.errors import ConfigError, VLLMValidationError
from vllm.model_executor.layers.attention.compressed_attention import LatentStates
from vllm.model_executor.model_loader import get_model

PROMPTS = make_prompts()
SOME = [PROMPTS[0], PROMPTS[3], PROMPTS[7]]
"""Of 1, 33 and 300 tokens."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 2000.0,
    "partial_rotary_factor": 0.25,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.0,
}
VARIANTS = {
    "tied, no experts by token": {"tie_word_embeddings": True, "mlp_layer_types": ["moe"] * 6},
    "windows only": {"layer_types": ["sliding_attention"] * 6},
    "yarn, other scores": {
        "scoring_func": "sigmoid",
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25},
            "compress": YARN,
        },
    },
}


@dataclass
class Case:
    folder: Path
    hf: Any


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    hf = make_hf_model("deepseek_v4")
    return Case(save(hf, tmp_path_factory.mktemp("v4")), hf)


@pytest.fixture(scope="module")
def reference(case) -> Generated:
    """Every prompt alone, equal to transformers."""
    with engine(case.folder, enable_prefix_caching=False) as llm:
        got = generate(llm, PROMPTS, one_by_one=True)
    assert_equals_transformers(got, case.hf)
    return got


def test_a_batch_and_again_out_of_the_prefix_cache(case):
    with engine(case.folder) as llm:
        first = generate(llm, SOME)
        again = generate(llm, SOME)
    assert_equals_transformers(first, case.hf)
    assert_same(again, first)
    # Whole blocks of every cache: of 256 tokens.
    assert again.cached == [0, 0, 256]


def test_nobody_writes_another_caches_bytes(case, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    with engine(case.folder, max_num_batched_tokens=40, max_num_seqs=8) as llm:
        assert_equals_transformers(generate(llm, SOME[1:2]), case.hf)


def test_the_planner_packs_kinds_of_caches_into_one_block(case):
    with engine(case.folder) as llm:
        core = llm.llm_engine.client._core
        config = core.scheduler.kv_cache_manager.kv_cache_config
        layers = core.executor.worker.model_runner.layers
    assert str(config.kv_cache_layout) == "BLHNC"
    assert all(isinstance(layer, LatentStates) for layer in layers.values())
    # A window each; compressed latents and their compressor in 4; an index with both in 2.
    assert len(layers) == 6 + 2 * 4 + 2 * 2
    sizes = {group.kv_cache_spec.block_size for group in config.kv_cache_groups}
    assert sizes == {4, 8, 64, 256}
    side_by_side = sum(
        config.kv_cache_groups[config.group_of(name)].spec_of(name).page_size_bytes
        for name in layers
    )
    assert config.bytes_per_block < side_by_side / 2, "groups overlay each other"


@pytest.mark.slow
def test_alone_in_one_batch_and_out_of_the_prefix_cache(case, reference):
    with engine(case.folder) as llm:
        assert_same(generate(llm, PROMPTS), reference)
        assert_same(generate(llm, PROMPTS), reference)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [7, 40])
def test_prompts_in_chunks(case, reference, tokens):
    with engine(case.folder, max_num_batched_tokens=max(tokens, 8), max_num_seqs=8) as llm:
        assert_same(generate(llm, PROMPTS), reference)


@pytest.mark.slow
def test_after_preemption(case, reference):
    small = {"num_gpu_blocks_override": 62, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(case.folder, **small) as llm:
        assert_same(generate(llm, PROMPTS), reference)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.slow
def test_in_the_other_layout_that_packs_blocks(case, reference, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLNHC")
    with engine(case.folder) as llm:
        assert_same(generate(llm, PROMPTS), reference)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "LHBNC", "BHLNC"])
def test_other_layouts_are_refused_with_the_reason(case, layout, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with (
        pytest.raises(ConfigError, match=f"{layout} cannot be used: .*what works: BLHNC, BLNHC"),
        engine(case.folder),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path):
    hf = make_hf_model("deepseek_v4", **VARIANTS[variant])
    with engine(save(hf, tmp_path)) as llm:
        assert_equals_transformers(generate(llm, SOME), hf)


@pytest.mark.slow
@torch.inference_mode()
def test_packed_latents_come_close(tmp_path):
    """Latents of 512 are kept as fp8: 584 bytes each, and index keys of 64 in 68."""
    wide = {
        "head_dim": 512,
        "num_attention_heads": 2,
        "partial_rotary_factor": 0.125,
        "index_head_dim": 64,
    }
    hf = make_hf_model("deepseek_v4", **wide)
    prompt = PROMPTS[5]
    with engine(save(hf, tmp_path), kv_cache_memory_bytes=1 << 26) as llm:
        core = llm.llm_engine.client._core
        layers = core.executor.worker.model_runner.layers
        widths = {layer.kv_cache.shape[-1] for layer in layers.values()}
        got = generate(llm, [prompt])
    assert {584, 68} <= widths
    theirs = hf(torch.tensor([prompt + got.tokens[0][:-1]])).logits[0, -64:]
    # Rounding may send a token to another expert where two are nearly as good.
    assert torch.cosine_similarity(got.logits[0], theirs).median() > 0.97


def test_released_names_and_what_is_missing(case, tmp_path):
    save(case.hf, tmp_path)
    released = {
        "model.embed_tokens": "embed",
        "model.hc_head.hc_": "hc_head_",
        "model.": "",
        "attn.norm": "attn.kv_norm",
    }

    def rename(tensors):
        for name in list(tensors):
            new = name
            for here, there in released.items():
                if (here == "attn.norm" and ".attn.norm." in new) or new.startswith(here):
                    new = new.replace(here, there, 1)
            tensors[new] = tensors.pop(name)
        del tensors["layers.1.attn.indexer.wq_b.weight"]
        tensors["mtp.0.attn.wq_a.weight"] = torch.zeros(1)
        tensors["layers.1.attn.wrong.weight"] = torch.zeros(1)

    edit(tmp_path, rename)
    message = load_error(tmp_path)
    assert "1 missing: model.layers.1.attn.core.indexer.wq_b.weight; " in message
    assert "1 unexpected: model.layers.1.attn.wrong.weight" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"compress_ratios": [0, 4, 16, 0, 4, 8]},
            "compress_ratios says 8 for layer 5; ratios are 0, 4, 16",
        ),
        ({"compress_ratios": [0, 4, "16"] * 2}, "compress_ratios says '16' for layer 2"),
        ({"compress_ratios": 4}, "compress_ratios must be a list of numbers, one a layer, not 4"),
        ({"compress_ratios": [0, 4, 16]}, "layer_types names 3 layers, but num_hidden_layers is 6"),
        ({"compress_rate_csa": 8}, "compress_rates.compressed_sparse_attention must be 4, not 8"),
        ({"compress_rate_hca": 4}, "heavily_compressed_attention must not be that of"),
        ({"compress_rate_hca": 48}, "48 tokens a compressed latent do not divide the 256"),
        (
            {"layer_types": ["full_attention"] * 6},
            "layer_types of deepseek_v4 may be .*, not full_attention",
        ),
    ],
)
def test_ratios_that_no_layer_has_are_refused(case, values, message, tmp_path):
    save(case.hf, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if "compress_ratios" in values:
        del config["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(VLLMValidationError, match=message), engine(tmp_path):
        pass


def test_ratios_say_what_layers_are(case, tmp_path):
    save(case.hf, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kinds = config.pop("layer_types")
    # One more than layers: of a layer that guesses further tokens.
    config["compress_ratios"] = [0, 4, 16] * 2 + [0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    resolved = make_config(tmp_path).model_config.hf_text_config
    assert resolved.layer_types == kinds
    assert resolved.compress_ratios == [0, 4, 16] * 2


def test_groups_of_heads_that_the_ranks_do_not_divide_are_refused(case):
    with (
        seen_from(0, 4),
        pytest.raises(ConfigError, match=r"-size 4 does not divide .* heads \(o_groups\) \(2\)"),
    ):
        get_model(make_config(case.folder))


def test_an_index_that_is_narrower_than_its_rotation_is_refused(case, tmp_path):
    save(case.hf, tmp_path)
    with (
        pytest.raises(ConfigError, match="index_head_dim 4 is less than the 8 dimensions"),
        engine(tmp_path, hf_overrides={"index_head_dim": 4}),
    ):
        pass
