"""Tokens/s of a random model of 60 to 140M parameters of each family, beside transformers' own.

    python benchmarks/models/families.py [FAMILY ...] [--dtype bfloat16]

Decode: 8 requests together. Prefill: one prompt of 2,048 tokens. Both sides take turns on the same
weights in the same process, and the best of a few runs of each counts, so that what else the
machine does strikes both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine
import torch
import transformers

from vllm import LLM, SamplingParams

VOCAB = 32000
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 512,
            "num_hidden_layers": 12,
        },
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"intermediate_size": 1024, "num_local_experts": 8},
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 1024,
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "head_dim": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
        },
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        {
            "head_dim": 64,
            "intermediate_size": 512,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
    "llama4": (
        transformers.Llama4TextConfig,
        transformers.Llama4ForCausalLM,
        {
            "head_dim": 64,
            "intermediate_size": 1024,
            "intermediate_size_mlp": 2048,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 1024,
        },
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        transformers.Qwen3NextForCausalLM,
        {
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
        },
    ),
    "lfm2": (
        transformers.Lfm2Config,
        transformers.Lfm2ForCausalLM,
        {
            "num_hidden_layers": 16,
            "layer_types": ["conv", "conv", "full_attention", "conv"] * 4,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "minimax": (
        transformers.MiniMaxConfig,
        transformers.MiniMaxForCausalLM,
        {
            "head_dim": 64,
            "intermediate_size": 1024,
            "num_local_experts": 8,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
        },
    ),
    "mamba": (
        transformers.MambaConfig,
        transformers.MambaForCausalLM,
        {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 16},
    ),
    "falcon_mamba": (
        transformers.FalconMambaConfig,
        transformers.FalconMambaForCausalLM,
        {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 16},
    ),
    "mamba2": (
        transformers.Mamba2Config,
        transformers.Mamba2ForCausalLM,
        {
            "hidden_size": 768,
            "num_hidden_layers": 16,
            "num_heads": 24,
            "head_dim": 64,
            "n_groups": 1,
        },
    ),
    "bamba": (
        transformers.BambaConfig,
        transformers.BambaForCausalLM,
        {
            "num_hidden_layers": 12,
            "attn_layer_indices": [3, 7, 11],
            "mamba_n_heads": 16,
            "mamba_d_state": 128,
        },
    ),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig,
        transformers.GraniteMoeHybridForCausalLM,
        {
            "num_hidden_layers": 12,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
            "intermediate_size": 256,
            "shared_intermediate_size": 512,
            "mamba_n_heads": 16,
            "mamba_d_state": 128,
        },
    ),
    "jamba": (
        transformers.JambaConfig,
        transformers.JambaForCausalLM,
        {
            "intermediate_size": 1024,
            "num_experts": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 3,
        },
    ),
    "nemotron_h": (
        transformers.NemotronHConfig,
        transformers.NemotronHForCausalLM,
        {
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 5,
            "head_dim": 64,
            "mamba_num_heads": 16,
            "n_groups": 1,
        },
    ),
    "falcon_h1": (
        transformers.FalconH1Config,
        transformers.FalconH1ForCausalLM,
        {
            "head_dim": 64,
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 16,
            "mamba_d_state": 128,
            "num_hidden_layers": 10,
        },
    ),
    "zamba2": (
        transformers.Zamba2Config,
        transformers.Zamba2ForCausalLM,
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_key_value_heads": 8,
            "layers_block_type": (["linear_attention"] * 3 + ["hybrid"]) * 3,
            "n_mamba_heads": 24,
            "num_mem_blocks": 2,
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        transformers.DeepseekV2ForCausalLM,
        {**LATENT, "q_lora_rank": None, "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        {**LATENT, "q_lora_rank": 256, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v4": (
        transformers.DeepseekV4Config,
        transformers.DeepseekV4ForCausalLM,
        {
            "num_key_value_heads": 1,
            "head_dim": 128,
            "q_lora_rank": 256,
            "o_groups": 2,
            "o_lora_rank": 256,
            "index_n_heads": 8,
            "index_head_dim": 64,
            "index_topk": 128,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            # What this configuration calls the inner size of an expert.
            "intermediate_size": 256,
        },
    ),
    "bart": (
        transformers.BartConfig,
        transformers.BartForConditionalGeneration,
        {
            "decoder_layers": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "forced_eos_token_id": None,
        },
    ),
    "kimi_linear": (
        transformers.KimiLinearConfig,
        transformers.KimiLinearForCausalLM,
        {
            "num_key_value_heads": 8,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "linear_num_heads": 8,
            "linear_head_dim": 64,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}
BATCH, SHORT, LONG = 8, 16, 2048
OUTPUT = 16
RUNS = 4


def measure(name: str, dtype: str) -> dict[str, object]:
    config_cls, model_cls, overrides = FAMILIES[name]
    torch.manual_seed(0)
    hf = model_cls(config_cls(**{**SHAPE, **overrides})).eval().to(getattr(torch, dtype))
    prompts = torch.randint(0, VOCAB, (BATCH, SHORT))
    long_prompt = torch.randint(0, VOCAB, (1, LONG))
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        llm = LLM(
            folder, dtype=dtype, max_model_len=4096, kv_cache_memory_bytes=1 << 28,
            skip_tokenizer_init=True, enable_prefix_caching=False,
        )  # fmt: skip

    threads = torch.get_num_threads()

    def ours(ids: torch.Tensor, tokens: int) -> None:
        # The engine has threads of its own, and leaves torch what it does not need.
        torch.set_num_threads(threads)
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        requests = [{"prompt_token_ids": row} for row in ids.tolist()]
        llm.generate(requests, params, use_tqdm=False)

    @torch.inference_mode()
    def theirs(ids: torch.Tensor, tokens: int) -> None:
        torch.set_num_threads(machine.num_cores())
        hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip

    result: dict[str, object] = {
        "million_parameters": round(sum(p.numel() for p in hf.parameters()) / 1e6, 1)
    }
    sides = {"vllm": ours, "transformers": theirs}
    # Each time is the least of several: differences of single ones would be mostly noise.
    first, all_tokens, long = ({side: float("inf") for side in sides} for _ in range(3))
    for generate in sides.values():
        generate(prompts, 2)
    for _ in range(RUNS):
        for side, generate in sides.items():
            for times, ids, tokens in (
                (first, prompts, 1),
                (all_tokens, prompts, OUTPUT + 1),
                (long, long_prompt, 1),
            ):
                start = time.perf_counter()
                generate(ids, tokens)
                times[side] = min(times[side], time.perf_counter() - start)
    llm.shutdown()
    decode = {side: BATCH * OUTPUT / (all_tokens[side] - first[side]) for side in sides}
    prefill = {side: LONG / long[side] for side in sides}
    for phase, rates in (("decode", decode), ("prefill", prefill)):
        for side, rate in rates.items():
            result[f"{phase}_{side}_tokens_per_s"] = round(rate, 1)
        result[f"{phase}_ratio"] = round(rates["vllm"] / rates["transformers"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    unknown = set(args.families) - FAMILIES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    transformers.utils.logging.set_verbosity_error()
    rates = machine.describe()
    # A run of some families leaves the others' figures as they are: each has its own date.
    result = machine.load("cpu_families") | rates
    for name in args.families:
        figures = measure(name, args.dtype)
        result[name] = {"date": rates["date"], "dtype": args.dtype, **figures}
        gc.collect()
        print(json.dumps({name: result[name]}), flush=True)
        machine.save("cpu_families", "python benchmarks/models/families.py [FAMILY ...]", result)


if __name__ == "__main__":
    main()
