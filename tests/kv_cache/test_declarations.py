"""What plans without a model declare is what built models declare: one source, checked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kv_cache.helpers import make_config
from vllm.config import CacheConfig, ParallelConfig, set_current_vllm_config
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention_layer_base import collect_layers
from vllm.model_executor.models.cache_declarations import (
    declare_kv_caches,
    declared_architectures,
)
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.hf_config import fill_in_config
from vllm.v1.kv_cache_interface import KVCacheSpecKind
from vllm.v1.worker.utils import get_kv_cache_specs

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
FIXTURES = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
SMALL = {"vocab_size": 256, "intermediate_size": 64, "moe_intermediate_size": 32}
SMALL |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 8, "n_group": 1}
SMALL |= {"topk_group": 1, "num_experts_per_tok": 2}
_GQA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "max_position_embeddings": 512,
}
_MAMBA2 = {
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
}
_STATES = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "conv_kernel": 4}
# Architectures without a fixture of their own.
OTHERS = {
    "bamba": _GQA | _MAMBA2 | {"attn_layer_indices": [1, 3]},
    "bart": {
        "d_model": 64,
        "decoder_attention_heads": 4,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_layers": 3,
        "max_position_embeddings": 512,
        "num_hidden_layers": 3,
    },
    "deepseek_v2": _GQA
    | {
        "kv_lora_rank": 32,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "falcon_h1": _GQA | _MAMBA2 | {"mamba_d_ssm": 128, "head_dim": 16},
    "granitemoehybrid": _GQA
    | _MAMBA2
    | {"layer_types": ["mamba", "attention", "mamba", "mamba", "attention"]},
    "mamba": _STATES | {"intermediate_size": 64},
    "mamba2": _STATES | {"expand": 2, "head_dim": 16, "n_groups": 1, "num_heads": 4},
    "kimi_linear": _GQA
    | {
        "kv_lora_rank": 32,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_shared_experts": 1,
    },
    "lfm2_moe": _GQA | {"full_attn_idxs": [1, 3]},
    "minimax": _GQA,
    "gemma2": _GQA | {"sliding_window": 32, "head_dim": 16},
    "gemma3_text": _GQA | {"sliding_window": 32, "head_dim": 16, "num_hidden_layers": 8},
    "llama4_text": _GQA | {"attention_chunk_size": 64, "head_dim": 16},
    "mistral": _GQA | {"sliding_window": 48},
    "mixtral": _GQA,
    "qwen2": _GQA | {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 32},
    "qwen2_moe": _GQA | {"shared_expert_intermediate_size": 32},
    "qwen3": _GQA | {"head_dim": 32},
    "zamba2": {
        "hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention"],
        "mamba_d_state": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    },
}
ARCHITECTURE_OF = {
    "bamba": "BambaForCausalLM",
    "bart": "BartForConditionalGeneration",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
}
CASES = {
    **FIXTURES,
    **{
        kind: {"model_type": kind, "architectures": [ARCHITECTURE_OF[kind]], **values}
        for kind, values in OTHERS.items()
    },
}


def configure(values, tp_size=1, layers=None):
    values = json.loads(json.dumps(values))
    text = values.get("text_config", values)
    text.update({key: value for key, value in SMALL.items() if key in text})
    if layers is not None and text["num_hidden_layers"] > layers:
        text["num_hidden_layers"] = layers
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][:layers]
    text.pop("quantization_config", None)
    values.pop("quantization_config", None)
    hf_config = fill_in_config(values)
    base = make_config(max_model_len=512)
    return replace(
        base,
        model_config=replace(
            base.model_config,
            hf_config=hf_config,
            hf_text_config=hf_config.get_text_config(),
            architecture=values["architectures"][0],
            dtype_name="float32",
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=tp_size),
        cache_config=CacheConfig(block_size=32),
    )


def names_and_specs(specs):
    return {name: spec.with_layer_name("") for name, spec in specs.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_built_model_declares_the_same(case):
    config = configure(CASES[case], layers=12)
    architecture = config.model_config.architecture
    if architecture not in ModelRegistry.get_supported_archs():
        pytest.skip(f"{architecture} is not served yet")
    model_cls, _ = ModelRegistry.resolve_model_cls(architecture)
    with torch.device("meta"), set_current_vllm_config(config), collect_layers() as layers:
        model_cls(vllm_config=config)
    built = get_kv_cache_specs(layers, config)
    assert names_and_specs(declare_kv_caches(config)) == names_and_specs(built)


def test_every_served_architecture_is_declared_and_compared():
    served = set(ModelRegistry.get_supported_archs())
    served = {name for name in served if "Test" not in name}
    assert served <= set(declared_architectures())
    compared = {values["architectures"][0] for values in CASES.values()}
    same_text_model = {"Llama4ForConditionalGeneration": "Llama4ForCausalLM"}
    assert {same_text_model.get(name, name) for name in served} <= compared


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("case", FIXTURES)
def test_ranks_share_heads_out_or_hold_copies(case, tp_size):
    alone = declare_kv_caches(configure(FIXTURES[case]))
    shared = declare_kv_caches(configure(FIXTURES[case], tp_size))
    assert alone.keys() == shared.keys()
    for name, spec in shared.items():
        whole = alone[name]
        if spec.kind in (KVCacheSpecKind.MLA, KVCacheSpecKind.SLIDING_WINDOW_MLA):
            assert spec == whole
        elif spec.kind is KVCacheSpecKind.MAMBA:
            assert whole.page_size_bytes / tp_size <= spec.page_size_bytes <= whole.page_size_bytes
        else:
            assert spec.num_kv_heads == max(1, whole.num_kv_heads // tp_size)


def test_a_field_that_is_missing_is_named():
    values = dict(FIXTURES["falcon-mamba-7b"])
    # Without its type a model has no defaults.
    del values["state_size"], values["model_type"]
    with pytest.raises(ConfigError, match="no state_size or mamba_d_state"):
        declare_kv_caches(configure(values))
