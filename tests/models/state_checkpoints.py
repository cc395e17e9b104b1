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
}
"""What makes a small model of its type have every kind of layer at least twice."""


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
                param.normal_(0, 0.2)
    return model
