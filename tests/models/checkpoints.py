"""Tiny random checkpoints of the served architectures, written by transformers' own classes."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.harness import VOCAB

WINDOW = 24
"""Of windowed layers: more than a block of 16 tokens, and no multiple of one."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that a wrong weight shows in the logits
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "llama4_text": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "deepseek_v4": (transformers.DeepseekV4Config, transformers.DeepseekV4ForCausalLM),
}

_LATENT = {
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 2,
    "q_lora_rank": 40,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.4,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
}
KINDS: dict[str, dict[str, Any]] = {
    # Wide enough that a few requests fill a small pool: every layer forgets what is out of it.
    "mistral": {"sliding_window": 200},
    "deepseek_v2": {
        **_LATENT,
        "topk_method": "group_limited_greedy",
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1, "routed_scaling_factor": 2.5},
    "deepseek_v4": {
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 40,
        "o_groups": 2,
        "o_lora_rank": 24,
        "sliding_window": WINDOW,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ]
        * 2,
        "compress_rates": {
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 16,
        },
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": 12,
        "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "swiglu_limit": 1.5,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 4,
        "max_position_embeddings": 512,
        "num_nextn_predict_layers": 0,
        # Through its mixed streams larger weights make rounding show.
        "initializer_range": 0.1,
    },
    "gemma2": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 6,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_hidden_layers": 4,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 72,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 4,
    },
    "qwen3_moe": {
        "num_hidden_layers": 5,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1, 4],
    },
    "gpt_oss": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 512,
        "swiglu_limit": 1.5,
    },
    "llama4_text": {
        "num_hidden_layers": 6,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 32,
        "floor_scale": 16,
    },
}
"""What makes a small model of its type have every kind of layer at least twice."""


def make_hf_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model; norms and biases are random too, so that each one counts."""
    config_cls, model_cls = CLASSES[model_type]
    torch.manual_seed(seed)
    config = config_cls(**{**SHAPE, **KINDS.get(model_type, {}), **overrides})
    config._attn_implementation = "eager"
    model = model_cls(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("norm.weight"):
                # Gemma's are stored less one.
                param.uniform_(*((-0.5, 0.5) if model_type.startswith("gemma") else (0.5, 1.5)))
            elif name.endswith(("bias", "sinks", "base")):
                param.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
            elif name.endswith("tid2eid"):
                buffer.random_(0, config.n_routed_experts)
    return model


def save(model: Any, folder: Path, max_shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
