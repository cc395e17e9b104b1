"""Tiny random checkpoints of models with state layers, written by transformers' own classes."""

from typing import Any

import torch
import transformers

from tests.models.harness import VOCAB

_COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3}
_ATTENTION = {
    **_COMMON,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
}
CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    "bamba": (transformers.BambaConfig, transformers.BambaForCausalLM),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig,
        transformers.GraniteMoeHybridForCausalLM,
    ),
    "nemotron_h": (transformers.NemotronHConfig, transformers.NemotronHForCausalLM),
    "jamba": (transformers.JambaConfig, transformers.JambaForCausalLM),
    "falcon_h1": (transformers.FalconH1Config, transformers.FalconH1ForCausalLM),
    "zamba2": (transformers.Zamba2Config, transformers.Zamba2ForCausalLM),
}
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {**_COMMON, "state_size": 12},
    "falcon_mamba": {**_COMMON, "state_size": 16, "mixer_rms_eps": 1e-3},
    "mamba2": {
        **_COMMON,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 24,
        "chunk_size": 16,
    },
    "bamba": {**_ATTENTION, **_MAMBA2, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA2,
        "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
    },
    "nemotron_h": {
        **_ATTENTION,
        "num_hidden_layers": 9,
        "layers_block_type": [
            *("linear_attention", "mlp", "moe", "linear_attention", "full_attention"),
            *("mlp", "linear_attention", "moe", "full_attention"),
        ],
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "routed_scaling_factor": 1.5,
        "head_dim": 24,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 24,
        "chunk_size": 16,
        "time_step_min": 0.4,
    },
    "jamba": {
        **_ATTENTION,
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 12,
    },
    "falcon_h1": {
        **_ATTENTION,
        **_MAMBA2,
        "num_hidden_layers": 3,
        "mamba_d_ssm": 96,
        "mamba_d_head": 12,
        "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 1.3,
        "embedding_multiplier": 2.0,
        "key_multiplier": 0.6,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [1.4, 0.7],
        "ssm_in_multiplier": 1.2,
        "ssm_multipliers": [0.8, 1.1, 0.9, 1.3, 0.7],
        "ssm_out_multiplier": 0.9,
    },
    "zamba2": {
        **_COMMON,
        "num_hidden_layers": 9,
        "layers_block_type": [
            *("linear_attention", "hybrid", "hybrid", "linear_attention"),
            *("hybrid", "linear_attention", "hybrid", "hybrid", "linear_attention"),
        ],
        "num_mem_blocks": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 24,
        "adapter_rank": 8,
        "chunk_size": 16,
        "max_position_embeddings": 512,
        "time_step_min": 0.4,
    },
}
"""What makes a small model of its type have every kind of layer at least twice."""


_STD = {"zamba2": 0.06}
"""Of weights: with larger ones than these, float32 loses its digits in the depth of a model."""


def make_state_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model, every parameter random, so that each one counts."""
    config_cls, model_cls = CLASSES[model_type]
    torch.manual_seed(seed)
    config = config_cls(**{**KINDS[model_type], **overrides})
    config._attn_implementation = "eager"
    model = model_cls(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last == "A_log":
                param.uniform_(-2.0, 1.0)
            elif last in ("D", "dt_bias", "bias"):
                param.normal_(0, 0.5)
            elif "norm" in name:
                param.uniform_(0.5, 1.5)
            elif "conv1d" in name:
                param.normal_(0, 0.6)
            else:
                param.normal_(0, _STD.get(model_type, 0.12))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
    return model
