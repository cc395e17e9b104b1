"""Every operator that has a kernel of ours, each with a PyTorch form of the same meaning.

On the CPU the compiled extension ``vllm._C`` is used where it was built and knows the dtype; else
PyTorch does the work, which is said once. This module owns the check of dtypes, shapes and strides
before an address is handed to C++; it must not know layers, caches' owners or models.

Letters: T tokens, Q query heads, K KV heads, D head size, B cache blocks, N tokens per block.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F

from vllm import _torch_ops
from vllm.logger import init_logger, log_once

try:
    from vllm import _C
except ImportError:
    _C = None

logger = init_logger(__name__)

__all__ = [
    "PackedWeight",
    "argmax",
    "embedding",
    "fused_add_rms_norm",
    "gate_up_silu",
    "has_extension",
    "isa",
    "linear",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "set_num_threads",
    "silu_and_mul",
    "store_kv_cache",
]


def has_extension() -> bool:
    """True if ``vllm._C`` was built and could be loaded."""
    return _C is not None


def isa() -> str:
    """Name of the instruction set that the kernels use; "pytorch" without the extension."""
    return "pytorch"


def set_num_threads(count: int, cores: list[int] | None = None) -> None:
    """Give the extension ``count`` threads, bound to ``cores`` if that is not empty."""
    if _C is None:
        log_once(
            logger,
            logging.WARNING,
            "vllm._C is not built: the CPU kernels are PyTorch's, several times slower "
            "(install a C++ compiler and run `pip install -e .` again)",
        )


class PackedWeight:
    """A weight of shape (n, k) in the order that the kernels read, the only copy there is.

    ``plain`` holds the tensor itself where nothing was packed (another device, no extension).
    """

    __slots__ = ("data", "dtype", "k", "n", "plain")

    def __init__(
        self,
        *,
        n: int,
        k: int,
        dtype: torch.dtype,
        data: torch.Tensor | None = None,
        plain: torch.Tensor | None = None,
    ) -> None:
        self.n = n
        self.k = k
        self.dtype = dtype
        self.data = data
        self.plain = plain

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.n, self.k))

    @property
    def nbytes(self) -> int:
        tensor = self.plain if self.data is None else self.data
        assert tensor is not None
        return tensor.nbytes

    def unpack(self) -> torch.Tensor:
        """The weight as an ordinary (n, k) tensor; a copy where it is packed."""
        assert self.plain is not None
        return self.plain


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Pack ``weight`` (n, k); the caller may drop it afterwards.

    One packed copy serves GEMV, GEMM and the reading of embedding rows.
    """
    n, k = weight.shape
    return PackedWeight(n=n, k=k, dtype=weight.dtype, plain=weight)


def linear(
    x: torch.Tensor, weight: PackedWeight | torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``; x (..., k), weight (n, k), bias (n,) -> (..., n), dtype of x."""
    if isinstance(weight, PackedWeight):
        assert weight.plain is not None
        weight = weight.plain
    return F.linear(x, weight, bias)


def gate_up_silu(x: torch.Tensor, weight: PackedWeight | torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``; weight (2 * i, k) is gate over up; -> (..., i)."""
    return silu_and_mul(linear(x, weight))


def embedding(ids: torch.Tensor, weight: PackedWeight | torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` of ``weight`` (n, k): (T,) integers -> (T, k)."""
    if isinstance(weight, PackedWeight):
        assert weight.plain is not None
        weight = weight.plain
    return F.embedding(ids, weight)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dim, in fp32 inside; x (..., h) may be strided; weight (h,).

    ``out`` may be ``x`` itself.
    """
    return _torch_ops.rms_norm(x, weight, eps, out)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """In place: ``residual += x``, then ``x = rms_norm(residual)``; both (T, h)."""
    _torch_ops.fused_add_rms_norm(x, residual, weight, eps)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :i]) * x[..., i:]``; x (..., 2 * i) -> (..., i)."""
    return _torch_ops.silu_and_mul(x)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row, the first of equal ones: (T, v) -> (T,) int64."""
    return _torch_ops.argmax(logits)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Rotate query and key in place.

    Args:
        positions: (T,) int64.
        query: (T, Q * D) or (T, Q, D); rows may be strided.
        key: (T, K * D) or (T, K, D), or None.
        head_size: D.
        cos_sin_cache: (max position, rotary dim): cosines, then sines. float32 is exact enough
            for long contexts; other dtypes are widened.
        is_neox: rotate halves (i, i + r/2); else neighbours (2i, 2i + 1).
    """
    _torch_ops.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


def store_kv_cache(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write each token's key and value to its slot.

    Args:
        key, value: (T, K, D), rows may be strided.
        kv_cache: (B, K, N, 2 * D), any strides with a dense last dim.
        slot_mapping: (S,) int64, S <= T; slot = block * N + offset, -1 is skipped. Tokens at and
            after S are padding.
    """
    _torch_ops.store_kv_cache(key, value, kv_cache, slot_mapping)


def rope_and_store(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Rotate ``query`` (T, Q, D) in place, rotate ``key`` (T, K, D), store key and value.

    ``key`` may or may not be rotated in place. Other arguments as in ``rotary_embedding`` and
    ``store_kv_cache``.
    """
    _torch_ops.rope_and_store(
        positions, query, key, value, cos_sin_cache, is_neox, kv_cache, slot_mapping
    )


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    causal: bool = True,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of new tokens over a paged cache that holds their keys and values already.

    Args:
        query: (T, Q, D), rows and heads may be strided.
        kv_cache: (B, K, N, 2 * D), any strides with a dense last dim; Q is a multiple of K.
        out: (T, Q, D), written for the tokens below ``query_start_loc[-1]``.
        query_start_loc: (R + 1,) int32, first token of each request.
        seq_lens: (R,) int32, tokens of each request in the cache, the new ones included.
        block_table: (R, max blocks) int32.
        scale: factor of the scores.
        causal: a token sees itself and what came before it; else all of its request.
        sliding_window: keys a token sees, itself included; 0 for all. Without ``causal`` it
            reaches as far ahead as back.
        logits_soft_cap: c of c * tanh(score / c); 0 for none.
        alibi_slopes: (Q,) float32; adds slope * (key position - query position).
        sinks: (Q,) float32; a score per head that takes part in the softmax and has no value.
    """
    _torch_ops.paged_attention(
        query,
        kv_cache,
        out,
        query_start_loc,
        seq_lens,
        block_table,
        scale,
        causal=causal,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
