"""A mixture of experts as one operator of the CPU extension.

Owns the list of addresses and sizes that ``_C.moe`` takes; as ``_custom_ops``, it checks what C++
will not, and knows no layer and no model.
"""

from __future__ import annotations

import struct
from typing import Any

import torch

from vllm import _custom_ops as ops
from vllm import _extension
from vllm._extension import GATES, address_of
from vllm._matmul_ops import PANEL

__all__ = ["MoeKernel"]

# The fields of struct MoeLayer in csrc/cpu/types.h, eight bytes each.
_FORMAT = struct.Struct("=6qd5q2d5q")
# Scoring in csrc/cpu/types.h.
_SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}


class MoeKernel:
    """Experts and the way to them; ``make`` makes one.

    Keeps the tensors that it reads alive. Weights must not be replaced afterwards.
    """

    __slots__ = ("_kept", "code", "dtype", "hidden_size", "num_experts", "packed", "top_k")

    def __init__(
        self,
        packed: bytes,
        kept: tuple[Any, ...],
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.packed = packed
        """``struct MoeLayer`` of csrc/cpu/types.h."""
        self._kept = kept
        self.num_experts, self.top_k, self.hidden_size = num_experts, top_k, hidden_size
        self.dtype, self.code = dtype, ops.DTYPE_CODES[dtype]

    @classmethod
    def make(
        cls,
        *,
        top_k: int,
        scoring: str,
        renormalize: bool,
        num_groups: int,
        topk_group: int,
        scaling: float,
        correction: torch.Tensor | None,
        gate: str,
        alpha: float,
        limit: float,
        weights: tuple[ops.PackedExperts | torch.Tensor, ops.PackedExperts | torch.Tensor],
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
        weigh_input: bool,
    ) -> MoeKernel | None:
        """A kernel for these weights, or None where it would not do.

        Args:
            scoring: of ``Routing.scoring_func``; what follows is as there.
            correction: (E,) float32, added to the scores for the choice.
            gate: of ``GATES``, with its numbers.
            weights, biases: of gate over up, (E, 2 * inner, hidden), and down, (E, hidden, inner).
            weigh_input: the weights of a token multiply what goes into its experts.
        """
        packed = [w for w in weights if isinstance(w, ops.PackedExperts)]
        if not ops.has_extension() or len(packed) != 2 or gate not in GATES:
            return None
        gate_up, down = packed
        if gate_up.addresses is None or down.addresses is None:
            return None
        num_experts, hidden_size, inner = down.shape
        dtype = down.weights[0].dtype
        assert gate_up.shape == (num_experts, 2 * inner, hidden_size)
        if (
            inner % PANEL
            or any(
                b is not None and (b.dtype is not dtype or not b.is_contiguous()) for b in biases
            )
            or (correction is not None and correction.dtype is not torch.float32)
        ):
            return None
        layer = _FORMAT.pack(
            num_experts,
            top_k,
            _SCORINGS[scoring],
            renormalize,
            num_groups,
            topk_group,
            scaling,
            address_of(correction),
            hidden_size,
            inner,
            ops.DTYPE_CODES[dtype],
            GATES[gate],
            alpha,
            limit,
            gate_up.addresses.data_ptr(),
            down.addresses.data_ptr(),
            *(address_of(bias) for bias in biases),
            weigh_input,
        )
        return cls(
            layer,
            (gate_up, down, biases, correction),
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            dtype=dtype,
        )

    def takes(self, x: torch.Tensor, logits: torch.Tensor) -> bool:
        return (
            x.is_cpu
            and x.dtype is self.dtype
            and x.stride(1) == 1
            and logits.stride(1) == 1
            and (logits.dtype is self.dtype or logits.dtype is torch.float32)
        )

    def run(
        self, x: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (T, hidden) and a router's logits (T, E) -> (T, hidden).

        Args:
            chosen: (T, k) int64 experts that were chosen already; scores only weigh them.

        Raises:
            IndexError: a chosen expert is none.
        """
        num_tokens = x.shape[0]
        assert x.shape[1] == self.hidden_size
        assert logits.shape == (num_tokens, self.num_experts)
        if chosen is not None:
            assert chosen.shape == (num_tokens, self.top_k) and chosen.dtype is torch.int64
            chosen = chosen.contiguous()
        out = torch.empty((num_tokens, self.hidden_size), dtype=self.dtype)
        _extension.kernels.moe(
            self.packed,
            x.data_ptr(),
            x.stride(0),
            logits.data_ptr(),
            logits.stride(0),
            ops.DTYPE_CODES[logits.dtype],
            address_of(chosen),
            out.data_ptr(),
            self.hidden_size,
            num_tokens,
        )
        return out
