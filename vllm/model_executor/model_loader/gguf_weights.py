"""The tensors of a GGUF file, dequantised and under Hugging Face's names.

Blocks of the common formats are expanded with torch (0.3 s for a model that takes the ``gguf``
package's NumPy 1.6 s), the others by the ``gguf`` package. Both give the same bits in float32.
A few threads work ahead of the caller, so that it packs one tensor while others are expanded.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from vllm.errors import ConfigError, UnsupportedError
from vllm.transformers_utils.gguf_file import GGUFFile, GGUFTensor

__all__ = ["gguf_weight_names", "gguf_weights"]

_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_PARTS = {
    **_PARTS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MAMBA_PARTS = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_out": "mixer.out_proj",
}
_GEMMAS = frozenset({"gemma2", "gemma3"})
"""Whose norms are stored with one added, as they are used; checkpoints have them without."""
_NOT_WEIGHTS = frozenset({"rope_freqs.weight"})
_INTERLEAVED_ARCHITECTURES = frozenset({"llama"})
_CHUNK = 1 << 20
"""Elements expanded at a time: 4 MiB of float32 stay in a core's cache."""

_MAX_THREADS = 4
_AHEAD = 4
"""Tensors expanded while the caller is busy with one before them."""

_Kind = GGMLQuantizationType


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte ``start`` of each block, as (blocks, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor, out: torch.Tensor) -> None:
    """16 bytes a block into 32 values: the low halves first, then the high ones."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 2:18], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 4:20], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:34].view(torch.int8))
    out.mul_(_half(blocks, 0))


_EXPANDERS: dict[int, Callable[[torch.Tensor, torch.Tensor], None]] = {
    _Kind.Q4_0: _q4_0,
    _Kind.Q4_1: _q4_1,
    _Kind.Q8_0: _q8_0,
}
_PLAIN = {
    _Kind.F32: torch.float32,
    _Kind.F16: torch.float16,
    _Kind.BF16: torch.bfloat16,
}


def gguf_weight_names(gguf: GGUFFile) -> dict[str, GGUFTensor]:
    """Hugging Face name -> tensor; a tensor of another meaning keeps its GGUF name."""
    known, layers = _PARTS, "model.layers"
    if gguf.architecture in _GEMMAS:
        known = _GEMMA_PARTS
    elif gguf.architecture == "mamba":
        known, layers = _MAMBA_PARTS, "backbone.layers"
    return {
        _hf_name(name, known, layers): tensor
        for name, tensor in gguf.tensors.items()
        if name not in _NOT_WEIGHTS
    }


def _hf_name(name: str, known: Mapping[str, str], layers: str) -> str:
    prefix, parts = "", name.split(".")
    if parts[0] == "blk" and len(parts) in (3, 4):
        prefix, parts = f"{layers}.{parts[1]}.", parts[2:]
    if len(parts) <= 2 and parts[0] in known:
        return prefix + ".".join((known[parts[0]], *parts[1:]))
    return name


def gguf_weights(gguf: GGUFFile, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor under its Hugging Face name, rounded once from float32 to ``dtype``.

    Raises:
        ConfigError: the file is cut off.
        UnsupportedError: a quantisation that the ``gguf`` package can't expand.
    """
    size = gguf.path.stat().st_size
    heads = {
        "self_attn.q_proj": gguf.get("attention.head_count"),
        "self_attn.k_proj": gguf.get("attention.head_count_kv", gguf.get("attention.head_count")),
    }
    interleaved = gguf.architecture in _INTERLEAVED_ARCHITECTURES
    with gguf.path.open("rb") as file:
        # Nothing writes to it: a copy-on-write map only keeps torch from warning about a
        # read-only buffer. The map lives as long as the tensor.
        data = torch.frombuffer(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8
        )

    adds_one = gguf.architecture in _GEMMAS

    def read(name: str, tensor: GGUFTensor) -> torch.Tensor:
        if adds_one and name.endswith("norm.weight"):
            # In float32: in 16 bits the small rest would lose most of its digits.
            return _read(data, tensor, torch.float32, gguf, size).sub_(1).to(dtype)
        if name.endswith("A_log"):
            # Stored as it is used, -exp(A_log), which 16 bits would blur.
            return _read(data, tensor, torch.float32, gguf, size).neg_().log_()
        weight = _read(data, tensor, dtype, gguf, size)
        if name.endswith("conv1d.weight"):
            return weight.unsqueeze(1)
        part = name.rsplit(".", 1)[0].split(".", 3)[-1]
        if interleaved and part in heads:
            return _split_rotary_halves(weight, heads[part])
        return weight

    names = gguf_weight_names(gguf)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        waiting: deque[tuple[str, Future[torch.Tensor]]] = deque()
        try:
            for name, tensor in names.items():
                waiting.append((name, pool.submit(read, name, tensor)))
                if len(waiting) > _AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(
    data: torch.Tensor, tensor: GGUFTensor, dtype: torch.dtype, gguf: GGUFFile, size: int
) -> torch.Tensor:
    try:
        kind = _Kind(tensor.type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UnsupportedError(
            f"--model {gguf.path}: tensor {tensor.name} has the unknown type {tensor.type_id}; "
            "a newer `gguf` package may know it",
            parameter="model",
        ) from None
    count = int(np.prod(tensor.shape))
    end = tensor.offset + count // block * block_bytes
    if end > size:
        raise ConfigError(
            f"--model {gguf.path} is incomplete: tensor {tensor.name} ends at byte {end}, the "
            f"file has {size}; download it again",
            parameter="model",
        )
    blocks = data[tensor.offset : end].view(-1, block_bytes)
    if kind in _PLAIN:
        return data[tensor.offset : end].clone().view(_PLAIN[kind]).view(tensor.shape).to(dtype)
    weight = torch.empty(count // block, block, dtype=dtype)
    rows = _CHUNK // block
    expand = _EXPANDERS.get(kind)
    wide = torch.empty(min(rows, len(blocks)), block, dtype=torch.float32)
    for start in range(0, len(blocks), rows):
        part = blocks[start : start + rows]
        if expand is not None:
            out = wide[: len(part)]
            expand(part, out)
        else:
            out = _expand_with_numpy(part, kind, tensor, gguf)
        weight[start : start + rows] = out
    return weight.view(tensor.shape)


def _expand_with_numpy(
    blocks: torch.Tensor, kind: Any, tensor: GGUFTensor, gguf: GGUFFile
) -> torch.Tensor:
    try:
        return torch.from_numpy(dequantize(blocks.numpy(), kind))
    except NotImplementedError:
        raise UnsupportedError(
            f"--model {gguf.path}: tensor {tensor.name} is quantised as {kind.name}, which the "
            "`gguf` package cannot expand",
            parameter="model",
        ) from None


def _split_rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows, (0, r/2, 1, r/2 + 1, ...), for (rows, ...)."""
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)
