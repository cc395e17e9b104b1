"""Tiny random checkpoints of models with linear attention and short convolutions."""

from typing import Any

import torch
import transformers

from tests.models.harness import VOCAB

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # With larger weights float32 itself is off by more than the tests allow.
    "initializer_range": 0.06,
}
CLASSES = {
    "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "lfm2": (transformers.Lfm2Config, transformers.Lfm2ForCausalLM),
    "lfm2_moe": (transformers.Lfm2MoeConfig, transformers.Lfm2MoeForCausalLM),
    "kimi_linear": (transformers.KimiLinearConfig, transformers.KimiLinearForCausalLM),
    "minimax": (transformers.MiniMaxConfig, transformers.MiniMaxForCausalLM),
}
_CONV, _LINEAR, _FULL = "conv", "linear_attention", "full_attention"
_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_MOE,
        "num_hidden_layers": 6,
        "layer_types": [_LINEAR, _LINEAR, _FULL] * 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "shared_expert_intermediate_size": 72,
        "mlp_only_layers": [1, 3],
    },
    "lfm2": {"layer_types": [_CONV, _FULL, _CONV, _CONV, _FULL]},
    "lfm2_moe": {**_MOE, "layer_types": [_CONV, _FULL, _CONV, _CONV, _FULL], "num_dense_layers": 2},
    "kimi_linear": {
        "layer_types": [_LINEAR, _FULL, _LINEAR, _LINEAR, _FULL],
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "n_group": 4,
        "topk_group": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "minimax": {
        "layer_types": [_LINEAR, _FULL, _LINEAR, _LINEAR, _FULL],
        "head_dim": 16,
        "num_local_experts": 5,
        "block_size": 32,
        "full_attn_alpha_factor": 1.5,
        "full_attn_beta_factor": 0.75,
        "linear_attn_alpha_factor": 1.25,
        "linear_attn_beta_factor": 0.5,
        "mlp_alpha_factor": 0.9,
        "mlp_beta_factor": 1.1,
    },
}
"""What makes a small model of its type have every kind of layer at least twice."""


def make_linear_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model, every parameter random, so that each one counts."""
    config_cls, model_cls = CLASSES[model_type]
    torch.manual_seed(seed)
    config = config_cls(**{**SHAPE, **KINDS[model_type], **overrides})
    config._attn_implementation = "eager"
    model = model_cls(config).eval()
    with torch.no_grad():
        for name, param in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rsplit(".", 1)[-1]
            if last == "A_log":
                param.uniform_(-3.0, 1.0)
            elif last in ("dt_bias", "bias", "expert_bias", "e_score_correction_bias"):
                param.normal_(0, 0.3)
            elif "norm" in name:
                # Qwen3-Next's are stored less one, but for the gated ones.
                less_one = model_type == "qwen3_next" and "linear_attn" not in name
                param.uniform_(*((-0.5, 0.5) if less_one else (0.5, 1.5)))
            elif "conv" in name and param.dim() == 3:
                param.normal_(0, 0.6)
    return model
