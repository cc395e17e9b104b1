"""Whole decoder layers as one operator of the CPU extension.

Owns the list of addresses and sizes that ``_C.decoder_layers`` takes; as ``_custom_ops``, it checks
what C++ will not, and knows no model.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm import _custom_ops as ops
from vllm import _extension
from vllm._extension import GATES, address_of

if TYPE_CHECKING:
    from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales

__all__ = ["DecoderLayerKernel", "run_decoder_layers"]

# The fields of struct DecoderLayer in csrc/cpu/types.h, eight bytes each.
_FORMAT = struct.Struct("=6qd20q2d8q2d8q")


def _are_vectors(tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> bool:
    return all(x is None or (x.dtype is dtype and x.stride(0) == 1) for x in tensors)


class DecoderLayerKernel:
    """A pre-norm decoder layer for ``run_decoder_layers``; ``make`` makes one.

    Keeps the tensors that it reads alive. Weights must not be replaced afterwards.
    """

    __slots__ = ("_fixed", "_kept", "_last", "cache", "dtype", "head_size", "hidden_size", "packed")

    def __init__(
        self,
        fixed: tuple[float, ...],
        last: tuple[float, ...],
        kept: tuple[Any, ...],
        hidden_size: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._fixed, self._last = fixed, last
        self._kept = kept
        self.hidden_size = hidden_size
        self.head_size = head_size
        self.dtype = dtype
        self.cache: torch.Tensor | None = None
        """The cache that ``packed`` speaks of."""
        self.packed = b""
        """``struct DecoderLayer`` of csrc/cpu/types.h."""

    @classmethod
    def make(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        eps: float,
        norms: tuple[torch.Tensor, torch.Tensor],
        head_norms: tuple[torch.Tensor | None, torch.Tensor | None],
        branch_norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        weights: tuple[ops.PackedWeight | torch.Tensor, ...],
        biases: tuple[torch.Tensor | None, ...],
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
        scale: float,
        logits_soft_cap: float,
        sliding_window: int,
        gate: str = "silu",
    ) -> DecoderLayerKernel | None:
        """A kernel for these weights, or None where it would not do.

        Args:
            norms: weights (hidden,) of the norms before attention and before the MLP.
            head_norms: weights (D,) of the norms of each query and key head.
            branch_norms: weights (hidden,) of the norms of what attention and the MLP give, before
                it is added. All norms have the dtype of the weights, or all float32.
            weights, biases: of qkv, output, gate over up, down.
            gate: "silu" or "gelu_tanh".
        """
        packed = [w for w in weights if isinstance(w, ops.PackedWeight) and w.plain is None]
        if not packed:
            return None
        dtype, norm_dtype = packed[0].dtype, norms[0].dtype
        all_norms = (*norms, *head_norms, *branch_norms)
        if (
            not ops.has_extension()
            or len(packed) != len(weights)
            or any(w.dtype is not dtype for w in packed)
            or norm_dtype not in (dtype, torch.float32)
            or not _are_vectors(all_norms, norm_dtype)
            or not _are_vectors(biases, dtype)
            or gate not in ("silu", "gelu_tanh")
            or head_size % 8
            or head_size > ops.MAX_HEAD_SIZE
            or cos_sin_cache.shape[1] > head_size
            or cos_sin_cache.dtype not in ops.DTYPE_CODES
        ):
            return None
        if sinks is not None:
            sinks = sinks.to(torch.float32)
        hidden_size = packed[0].k
        products = [
            address
            for weight, bias in zip(packed, biases, strict=True)
            for address in (weight.address, address_of(bias))
        ]
        fixed = (
            hidden_size,
            packed[3].k,
            num_heads,
            num_kv_heads,
            head_size,
            ops.DTYPE_CODES[dtype],
            eps,
            *(address_of(x) for x in (*norms, *head_norms)),
            *products,
            cos_sin_cache.data_ptr(),
            cos_sin_cache.stride(0),
            cos_sin_cache.shape[1],
            cos_sin_cache.shape[0],
            is_neox,
            ops.DTYPE_CODES[cos_sin_cache.dtype],
            address_of(alibi_slopes),
            address_of(sinks),
            scale,
            logits_soft_cap,
            sliding_window,
        )
        last = (*(address_of(x) for x in branch_norms), GATES[gate], norm_dtype is not dtype)
        kept = (packed, all_norms, biases, cos_sin_cache, alibi_slopes, sinks)
        return cls(fixed, last, kept, hidden_size, head_size, dtype)

    def bind(
        self, kv_cache: torch.Tensor, fmt: KVFormat | None = None, scales: SideScales | None = None
    ) -> None:
        """Take the layer's cache, (B, K, N, 2 * D) with a dense last dim.

        With ``fmt``, the ``KVFormat`` of a cache of single bytes, ``scales`` are the layer's
        ``SideScales``.
        """
        address, quantised = ops.cache_arguments(kv_cache, fmt, scales, self.head_size)
        self.cache = kv_cache
        self.packed = _FORMAT.pack(
            *self._fixed,
            *address,
            kv_cache.shape[2],
            0 if fmt is not None else ops.DTYPE_CODES[kv_cache.dtype],
            *quantised,
            *self._last,
        )


def run_decoder_layers(
    kernels: Sequence[DecoderLayerKernel],
    hidden_states: torch.Tensor,
    has_branch: bool,
    residual: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    causal: bool,
) -> None:
    """Run layers of one shape, one after another.

    Args:
        kernels: the layers, each bound to its cache.
        hidden_states: (T, hidden); the branch to be added to ``residual`` first if
            ``has_branch``; written with the last layer's branch.
        residual: (T, hidden), added to in place.
        others: as in ``rope_and_store`` and ``paged_attention``.

    Raises:
        IndexError: a position has no row in the layers' cosines and sines.
    """
    first = kernels[0]
    assert hidden_states.shape[1] == first.hidden_size
    assert hidden_states.dtype is first.dtype and residual.dtype is first.dtype
    assert hidden_states.is_contiguous() and residual.is_contiguous()
    assert positions.dtype is torch.int64 and slot_mapping.dtype is torch.int64
    assert query_start_loc.dtype is torch.int32 and seq_lens.dtype is torch.int32
    assert block_table.dtype is torch.int32 and block_table.stride(1) == 1
    _extension.kernels.decoder_layers(
        b"".join([kernel.packed for kernel in kernels]),
        hidden_states.data_ptr(),
        has_branch,
        residual.data_ptr(),
        hidden_states.shape[0],
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        slot_mapping.shape[0],
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        seq_lens.shape[0],
        causal,
    )
