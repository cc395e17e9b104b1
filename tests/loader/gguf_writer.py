"""Writes GGUF files as llama.cpp's converter would, from a Hugging Face model."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, kind = name.rsplit(".", 1)
    parts = GEMMA_PARTS if arch.startswith("gemma") else PARTS
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{parts[part]}.{kind}"
    return f"{parts[stem]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: halves become neighbouring pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Matrices in ``quantization``, vectors in float32."""
    config = model.config
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", 0) or 16)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)](key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if arch == "llama":
            if "q_proj" in name:
                weight = interleave(weight, config.num_attention_heads)
            elif "k_proj" in name:
                weight = interleave(weight, config.num_key_value_heads)
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        if weight.ndim == 2 and quantization != GGMLQuantizationType.F32:
            writer.add_tensor(
                gguf_name(name, arch), quantize(weight, quantization), raw_dtype=quantization
            )
        else:
            writer.add_tensor(gguf_name(name, arch), np.ascontiguousarray(weight))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MAMBA_PARTS = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "lm_head": "output",
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.out_proj": "ssm_out",
}


def write_mamba_gguf(
    path: Path, model: Any, quantization: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Path:
    """Mamba 1 or Falcon-Mamba; projections in ``quantization``."""
    config = model.config
    writer = GGUFWriter(str(path), "mamba")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(int(config.time_step_rank))
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_dt_b_c_rms(config.model_type == "falcon_mamba")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight, last = tensor.float().numpy(), name.rsplit(".", 1)[-1]
        block = f"blk.{name.split('.')[2]}." if name.startswith("backbone.layers.") else ""
        if last == "A_log":
            writer.add_tensor(f"{block}ssm_a", -np.exp(weight))
        elif last == "D":
            writer.add_tensor(f"{block}ssm_d", weight)
        else:
            stem = name.rsplit(".", 1)[0]
            part = MAMBA_PARTS[stem.split(".", 3)[3] if block else stem]
            weight = np.ascontiguousarray(weight.squeeze(1) if "conv1d.w" in name else weight)
            fits = name.endswith("_proj.weight") and weight.shape[1] % 32 == 0
            if fits and quantization != GGMLQuantizationType.F32:
                packed = quantize(weight, quantization)
                writer.add_tensor(f"{block}{part}.{last}", packed, raw_dtype=quantization)
            else:
                writer.add_tensor(f"{block}{part}.{last}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
