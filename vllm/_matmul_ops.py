"""Products with weights, packed for the CPU's kernels or plain: linear layers, experts, embeddings.

Owns the packed form of a weight. Like ``_custom_ops``, whose names these are too, it checks what
C++ will not, and must not know layers or models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm import _extension
from vllm._elementwise_ops import gelu_tanh_and_mul, silu_and_mul
from vllm._extension import DTYPE_CODES, GATES, address_of
from vllm.utils.huge_pages import HugePageArena

_cuda_ops: Any = None
if torch.version.cuda is not None:
    from vllm import _cuda_ops


__all__ = [
    "PANEL",
    "PackedExperts",
    "PackedWeight",
    "embedding",
    "embedding_part",
    "experts_gate_up_silu",
    "experts_linear",
    "gate_up_gelu_tanh",
    "gate_up_silu",
    "linear",
    "linear_gelu",
    "linear_into",
    "logits",
    "pack_experts",
    "pack_weight",
]

# Epilogue in csrc/cpu/types.h.
_PLAIN, _GATE_MUL, _FLOAT_OUT, _GELU = 0, 1, 2, 3
PANEL = 32
"""Columns of a panel of packed weights."""


class PackedWeight:
    """A weight of shape (n, k) in the order that the kernels read, the only copy there is.

    ``plain`` holds the tensor itself where nothing was packed (another device or dtype, no
    extension); else ``data`` holds its panels (csrc/cpu/gemm.cpp).
    """

    __slots__ = ("address", "code", "data", "dtype", "k", "n", "plain")

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
        self.address = address_of(data)
        self.code = DTYPE_CODES.get(dtype, -1)

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
        if self.plain is not None:
            return self.plain
        assert _extension.kernels is not None
        weight = torch.empty((self.n, self.k), dtype=self.dtype)
        _extension.kernels.unpack(
            weight.data_ptr(), self.k, self.address, self.n, self.k, self.code
        )
        return weight


_weights = HugePageArena()


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Pack ``weight`` (n, k); the caller may drop it afterwards.

    One packed copy serves GEMV, GEMM and the reading of embedding rows.
    """
    n, k = weight.shape
    if _extension.kernels is None or not weight.is_cpu or weight.dtype not in DTYPE_CODES:
        return PackedWeight(n=n, k=k, dtype=weight.dtype, plain=weight)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    code = DTYPE_CODES[weight.dtype]
    data = _weights.empty(_extension.kernels.packed_size(n, k, code))
    _extension.kernels.pack(weight.data_ptr(), weight.stride(0), data.data_ptr(), n, k, code)
    return PackedWeight(n=n, k=k, dtype=weight.dtype, data=data)


def _product(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    n: int,
    epilogue: int,
    out: torch.Tensor | None = None,
    gate: int = GATES["silu"],
) -> torch.Tensor:
    if x.dim() != 2:
        flat = _product(x.reshape(-1, x.shape[-1]), weight, bias, n, epilogue, gate=gate)
        return flat.view(*x.shape[:-1], n)
    m, k = x.shape
    if k != weight.k or x.dtype is not weight.dtype:
        raise ValueError(
            f"input {tuple(x.shape)} {x.dtype} does not fit a weight {tuple(weight.shape)} "
            f"{weight.dtype}"
        )
    if x.stride(1) != 1:
        x = x.contiguous()
    dtype = torch.float32 if epilogue == _FLOAT_OUT else weight.dtype
    if out is None:
        out = torch.empty((m, n), dtype=dtype)
    elif out.shape != (m, n) or out.dtype is not dtype or out.stride(1) != 1:
        raise ValueError(f"{out.dtype} output {tuple(out.shape)} for a product ({m}, {n})")
    _extension.kernels.gemm(
        x.data_ptr(),
        x.stride(0),
        weight.address,
        address_of(bias),
        out.data_ptr(),
        out.stride(0),
        m,
        n,
        k,
        weight.code,
        epilogue,
        gate,
    )
    return out


def linear_into(
    x: torch.Tensor, weight: PackedWeight | torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """``linear`` of x (m, k) written to ``out`` (m, n), whose rows may be strided."""
    if isinstance(weight, PackedWeight):
        if weight.plain is None:
            return _product(x, weight, None, weight.n, _PLAIN, out)
        weight = weight.plain
    return out.copy_(F.linear(x, weight))


def linear(
    x: torch.Tensor, weight: PackedWeight | torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``; x (..., k), weight (n, k), bias (n,) -> (..., n), dtype of x.

    Sums are in fp32.

    Raises:
        ValueError: a packed weight has another k or dtype than x.
    """
    if isinstance(weight, PackedWeight):
        if weight.plain is None:
            return _product(x, weight, bias, weight.n, _PLAIN)
        weight = weight.plain
    if x.is_cuda:
        return _cuda_ops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(
    x: torch.Tensor, weight: PackedWeight | torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``gelu(linear(x, weight, bias))``, by the error function: (..., k) -> (..., n)."""
    if isinstance(weight, PackedWeight) and weight.plain is None:
        return _product(x, weight, bias, weight.n, _GELU)
    return F.gelu(linear(x, weight, bias))


def logits(
    x: torch.Tensor, weight: PackedWeight | torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As ``linear``, but fp32 where the kernel has fp32 sums to give: (..., k) -> (..., n).

    Rounded to bf16, the best of many tokens are often equal, and a log-probability has two digits.
    """
    if isinstance(weight, PackedWeight) and weight.plain is None:
        return _product(x, weight, bias, weight.n, _FLOAT_OUT)
    return linear(x, weight, bias)


def gate_up_silu(x: torch.Tensor, weight: PackedWeight | torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``; weight (2 * i, k) is gate over up; -> (..., i)."""
    if isinstance(weight, PackedWeight) and weight.plain is None and weight.n % (2 * PANEL) == 0:
        return _product(x, weight, None, weight.n // 2, _GATE_MUL)
    if x.is_cuda and x.dim() == 2:
        plain = weight.plain if isinstance(weight, PackedWeight) else weight
        return _cuda_ops.gate_up_silu(x, plain)
    return silu_and_mul(linear(x, weight))


def gate_up_gelu_tanh(x: torch.Tensor, weight: PackedWeight | torch.Tensor) -> torch.Tensor:
    """``gate_up_silu`` with GELU, by its tanh formula, in SiLU's place."""
    if isinstance(weight, PackedWeight) and weight.plain is None and weight.n % (2 * PANEL) == 0:
        return _product(x, weight, None, weight.n // 2, _GATE_MUL, gate=GATES["gelu_tanh"])
    return gelu_tanh_and_mul(linear(x, weight))


class PackedExperts:
    """Weights of one shape (n, k) that are used together, each packed; ``pack_experts`` makes one.

    ``weights`` has them one by one; ``addresses`` (experts,) int64 is what the kernel reads, None
    where nothing was packed.
    """

    __slots__ = ("addresses", "weights")

    def __init__(self, weights: list[PackedWeight]) -> None:
        self.weights = weights
        self.addresses: torch.Tensor | None = None
        if all(weight.plain is None for weight in weights):
            self.addresses = torch.tensor([weight.address for weight in weights])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.weights), *self.weights[0].shape))


def pack_experts(weights: torch.Tensor) -> PackedExperts:
    """Pack each of ``weights`` (experts, n, k); the caller may drop them afterwards."""
    return PackedExperts([pack_weight(weight) for weight in weights])


def experts_linear(
    x: torch.Tensor,
    weights: PackedExperts | torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear`` of each run of rows with a weight of its own.

    Args:
        x: (M, k); the first ``counts[0]`` rows are multiplied with ``weights[0]``, and so on.
        weights: (experts, n, k).
        counts: (experts,) int64, in sum M.
        bias: (experts, n).

    Returns:
        (M, n), dtype of x.

    Raises:
        ValueError: x, counts or bias do not fit the weights.
    """
    return _experts_product(x, weights, counts, bias, weights.shape[1], _PLAIN)


def experts_gate_up_silu(
    x: torch.Tensor, weights: PackedExperts | torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """``gate_up_silu`` of each run of rows with a weight of its own; as ``experts_linear``."""
    width = weights.shape[1]
    is_packed = isinstance(weights, PackedExperts) and weights.addresses is not None
    if is_packed and width % (2 * PANEL) == 0:
        return _experts_product(x, weights, counts, None, width // 2, _GATE_MUL)
    return silu_and_mul(_experts_product(x, weights, counts, None, width, _PLAIN))


def _experts_product(
    x: torch.Tensor,
    weights: PackedExperts | torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    epilogue: int,
) -> torch.Tensor:
    num_experts = weights.shape[0]
    if counts.shape != (num_experts,) or counts.dtype is not torch.int64:
        raise ValueError(f"{counts.dtype} counts {tuple(counts.shape)} for {num_experts} weights")
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    if isinstance(weights, torch.Tensor) or weights.addresses is None:
        each = weights if isinstance(weights, torch.Tensor) else weights.weights
        runs = counts.tolist()
        if sum(runs) != x.shape[0]:
            raise ValueError(f"the experts' rows are {sum(runs)} in sum, not {x.shape[0]}")
        for i, (rows, part) in enumerate(zip(runs, out.split(runs), strict=True)):
            if rows:
                start = part.storage_offset() // n
                one_bias = None if bias is None else bias[i]
                part.copy_(linear(x[start : start + rows], each[i], one_bias))
        return out
    first = weights.weights[0]
    if x.shape[1] != first.k or x.dtype is not first.dtype or x.stride(1) != 1:
        raise ValueError(
            f"input {tuple(x.shape)} {x.dtype} does not fit weights {tuple(weights.shape)} "
            f"{first.dtype}"
        )
    if bias is not None and (
        bias.shape != (num_experts, n) or bias.dtype is not x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(
            f"biases {tuple(bias.shape)} must be ({num_experts}, {n}), dense, {x.dtype}"
        )
    _extension.kernels.experts(
        x.data_ptr(),
        x.stride(0),
        weights.addresses.data_ptr(),
        counts.data_ptr(),
        num_experts,
        address_of(bias),
        out.data_ptr(),
        n,
        x.shape[0],
        n,
        first.k,
        first.code,
        epilogue,
    )
    return out


def embedding(ids: torch.Tensor, weight: PackedWeight | torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` of ``weight`` (n, k): (T,) integers -> (T, k).

    Raises:
        IndexError: an id is not a row.
    """
    if isinstance(weight, PackedWeight):
        if weight.plain is None:
            ids = ids.to(torch.int64).contiguous()
            out = torch.empty((*ids.shape, weight.k), dtype=weight.dtype)
            _extension.kernels.embedding(
                ids.data_ptr(),
                ids.numel(),
                weight.address,
                out.data_ptr(),
                weight.n,
                weight.k,
                weight.code,
            )
            return out
        weight = weight.plain
    return F.embedding(ids, weight)


def embedding_part(
    ids: torch.Tensor, weight: PackedWeight | torch.Tensor, first: int, count: int
) -> torch.Tensor:
    """Rows ``ids - first`` of ``weight`` (count, k), and zeros for ids that are not among them.

    Ids: (T,) integers of a table that several hold a part of -> (T, k).
    """
    table = weight.plain if isinstance(weight, PackedWeight) else weight
    if ids.is_cuda and ids.dim() == 1 and table is not None:
        return _cuda_ops.embedding_part(ids, table, first)
    local = ids - first
    elsewhere = (local < 0) | (local >= count)
    output = embedding(local.masked_fill(elsewhere, 0), weight)
    return output.masked_fill_(elsewhere.unsqueeze(-1), 0)
