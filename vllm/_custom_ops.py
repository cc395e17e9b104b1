"""Every operator that has a kernel of ours, each with a PyTorch form of the same meaning.

On the CPU the compiled extension ``vllm._C`` is used where it was built and knows the dtype; else
PyTorch does the work, which is said once. On a GPU ``_cuda_ops`` has the kernels. This module
owns the check of dtypes, shapes and strides before an address is handed to C++; it must not know
layers, caches' owners or models.

Letters: T tokens, Q query heads, K KV heads, D head size, B cache blocks, N tokens per block.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vllm import _torch_ops
from vllm.logger import init_logger, log_once
from vllm.utils.huge_pages import HugePageArena
from vllm.utils.torch_utils import nvfp4_split_data_scale

try:
    from vllm import _C
except ImportError:
    _C = None

_cuda_ops: Any = None
if torch.version.cuda is not None:
    from vllm import _cuda_ops

logger = init_logger(__name__)

__all__ = [
    "PackedExperts",
    "PackedWeight",
    "argmax",
    "embedding",
    "embedding_part",
    "experts_gate_up_silu",
    "experts_linear",
    "fused_add_rms_norm",
    "gate_up_gelu_tanh",
    "gate_up_silu",
    "gelu_tanh_and_mul",
    "has_extension",
    "isa",
    "layer_norm",
    "linear",
    "linear_gelu",
    "linear_into",
    "logits",
    "pack_experts",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "rope_and_store",
    "rotary_embedding",
    "set_isa",
    "set_num_threads",
    "silu_and_mul",
    "store_kv_cache",
    "store_latent",
    "supported_isas",
    "swiglu_oai_and_mul",
]

# DType and Epilogue in csrc/cpu/types.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN, _GATE_MUL, _FLOAT_OUT, _GELU = 0, 1, 2, 3
# Gate in csrc/cpu/types.h.
_SILU, _GELU_TANH, _SWIGLU_OAI = 0, 1, 2
# Columns of a panel of packed weights.
_PANEL = 32
# Of keys, and of values: kMaxHead in csrc/cpu/attention_tile.h.
MAX_HEAD_SIZE = 576
_MAX_ROTARY = 1024


def has_extension() -> bool:
    """True if ``vllm._C`` was built and could be loaded."""
    return _C is not None


def isa() -> str:
    """Name of the instruction set that the kernels use; "pytorch" without the extension."""
    return "pytorch" if _C is None else _C.isa()


def supported_isas() -> list[str]:
    """Instruction sets that this processor has kernels for, widest first."""
    return [] if _C is None else _C.isas()


def set_isa(name: str) -> None:
    """Use the kernels of another instruction set of ``supported_isas``.

    Raises:
        ValueError: not one of them.
    """
    if _C is None:
        raise ValueError(f"the extension is not built: there are no kernels called {name}")
    _C.set_isa(name)


def set_num_threads(count: int, cores: Sequence[int] = ()) -> None:
    """Give the extension ``count`` threads; thread i is bound to ``cores[i]`` if there are any."""
    if _C is None:
        log_once(
            logger,
            logging.WARNING,
            "vllm._C is not built: the CPU kernels are PyTorch's, several times slower "
            "(install a C++ compiler, then run `make install` again)",
        )
        return
    _C.set_threads(count, *cores)


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
        self.address = 0 if data is None else data.data_ptr()
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
        assert _C is not None
        weight = torch.empty((self.n, self.k), dtype=self.dtype)
        _C.unpack(weight.data_ptr(), self.k, self.address, self.n, self.k, self.code)
        return weight


_weights = HugePageArena()


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Pack ``weight`` (n, k); the caller may drop it afterwards.

    One packed copy serves GEMV, GEMM and the reading of embedding rows.
    """
    n, k = weight.shape
    if _C is None or not weight.is_cpu or weight.dtype not in DTYPE_CODES:
        return PackedWeight(n=n, k=k, dtype=weight.dtype, plain=weight)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    code = DTYPE_CODES[weight.dtype]
    data = _weights.empty(_C.packed_size(n, k, code))
    _C.pack(weight.data_ptr(), weight.stride(0), data.data_ptr(), n, k, code)
    return PackedWeight(n=n, k=k, dtype=weight.dtype, data=data)


def _product(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    n: int,
    epilogue: int,
    out: torch.Tensor | None = None,
    gate: int = _SILU,
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
    _C.gemm(
        x.data_ptr(),
        x.stride(0),
        weight.address,
        0 if bias is None else bias.data_ptr(),
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
    if isinstance(weight, PackedWeight) and weight.plain is None and weight.n % (2 * _PANEL) == 0:
        return _product(x, weight, None, weight.n // 2, _GATE_MUL)
    if x.is_cuda and x.dim() == 2:
        plain = weight.plain if isinstance(weight, PackedWeight) else weight
        return _cuda_ops.gate_up_silu(x, plain)
    return silu_and_mul(linear(x, weight))


def gate_up_gelu_tanh(x: torch.Tensor, weight: PackedWeight | torch.Tensor) -> torch.Tensor:
    """``gate_up_silu`` with GELU, by its tanh formula, in SiLU's place."""
    if isinstance(weight, PackedWeight) and weight.plain is None and weight.n % (2 * _PANEL) == 0:
        return _product(x, weight, None, weight.n // 2, _GATE_MUL, gate=_GELU_TANH)
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
    if is_packed and width % (2 * _PANEL) == 0:
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
    _C.experts(
        x.data_ptr(),
        x.stride(0),
        weights.addresses.data_ptr(),
        counts.data_ptr(),
        num_experts,
        0 if bias is None else bias.data_ptr(),
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
            _C.embedding(
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


def _rows_of(x: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(outer, inner, outer stride, inner stride) of the rows along the last dim, if so told."""
    if x.stride(-1) != 1:
        return None
    if x.dim() == 2:
        return x.shape[0], 1, x.stride(0), 0
    if x.dim() == 3:
        return x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    return (1, 1, 0, 0) if x.dim() == 1 else None


def _norm_kernel_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _C is not None
        and x.is_cpu
        and x.dtype in DTYPE_CODES
        and (weight.dtype is x.dtype or weight.dtype is torch.float32)
        and weight.is_contiguous()
    )


def _norm_kernel(x: torch.Tensor, weight: torch.Tensor) -> Any:
    return _C.rms_norm if weight.dtype is x.dtype else _C.rms_norm_float_weight


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dim, in fp32 inside; x (..., h) may be strided; weight (h,).

    ``out`` may be ``x`` itself. The weight has the dtype of x, or float32.
    """
    if x.is_cuda and x.dim() <= 3 and x.stride(-1) == 1:
        return _cuda_ops.rms_norm(x, weight, eps, out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if _norm_kernel_takes(x, weight):
        rows, out_rows = _rows_of(x), _rows_of(out)
        if rows is not None and out_rows is not None:
            _norm_kernel(x, weight)(
                x.data_ptr(),
                out.data_ptr(),
                0,
                weight.data_ptr(),
                rows[0],
                rows[1],
                x.shape[-1],
                rows[2],
                rows[3],
                out_rows[2],
                out_rows[3],
                0,
                eps,
                DTYPE_CODES[x.dtype],
            )
            return out
    return _torch_ops.rms_norm(x, weight, eps, out)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """In place: ``residual += x``, then ``x = rms_norm(residual)``; both (T, h)."""
    if _norm_kernel_takes(x, weight) and x.dim() == 2 and residual.dtype is x.dtype:
        rows, size = x.shape
        stride = x.stride(0)
        _norm_kernel(x, weight)(
            x.data_ptr(),
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            rows,
            1,
            size,
            stride,
            0,
            stride,
            0,
            residual.stride(0),
            eps,
            DTYPE_CODES[x.dtype],
        )
        return
    if x.is_cuda and x.dim() == 2:
        _cuda_ops.fused_add_rms_norm(x, residual, weight, eps)
        return
    _torch_ops.fused_add_rms_norm(x, residual, weight, eps)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Layer norm of the rows of ``x``, or of ``x + residual``, all (T, h); weight, bias (h,)."""
    rows = [x] if residual is None else [x, residual]
    if (
        _C is None
        or not x.is_cpu
        or x.dtype not in DTYPE_CODES
        or any(r.dim() != 2 or r.shape != x.shape or r.stride(1) != 1 for r in rows)
        or any(t.dtype is not x.dtype or t.stride(-1) != 1 for t in (*rows, weight, bias))
    ):
        whole = x if residual is None else x + residual
        return F.layer_norm(whole, whole.shape[-1:], weight, bias, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    _C.layer_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        *x.shape,
        eps,
        DTYPE_CODES[x.dtype],
    )
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :i]) * x[..., i:]``; x (..., 2 * i) -> (..., i)."""
    if x.is_cuda and x.dim() == 2 and x.stride(1) == 1:
        return _cuda_ops.silu_and_mul(x)
    if _C is None or not x.is_cpu or x.dtype not in DTYPE_CODES or x.dim() != 2 or x.stride(1) != 1:
        return _torch_ops.silu_and_mul(x)
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    _C.silu_mul(x.data_ptr(), x.stride(0), out.data_ptr(), rows, width // 2, DTYPE_CODES[x.dtype])
    return out


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(x[..., :i]) * x[..., i:]``, gelu by its tanh formula; x (..., 2 * i) -> (..., i)."""
    out = _gated_mul(x, _GELU_TANH, 0.0, 0.0)
    return _torch_ops.gelu_tanh_and_mul(x) if out is None else out


def swiglu_oai_and_mul(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)``; x (..., 2 * i), gate before up -> (..., i).

    The gate is at most ``limit``, up within ``[-limit, limit]``.
    """
    out = _gated_mul(x, _SWIGLU_OAI, alpha, limit)
    return _torch_ops.swiglu_oai_and_mul(x, alpha, limit) if out is None else out


def _gated_mul(x: torch.Tensor, gate: int, alpha: float, limit: float) -> torch.Tensor | None:
    """By the kernel; None where it does not take x."""
    if _C is None or not x.is_cpu or x.dtype not in DTYPE_CODES or x.dim() != 2:
        return None
    if x.stride(1) != 1:
        return None
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    _C.gated_mul(
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        rows,
        width // 2,
        DTYPE_CODES[x.dtype],
        gate,
        alpha,
        limit,
    )
    return out


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row, the first of equal ones: (T, v) -> (T,) int64.

    A NaN counts as the largest; -1 where the largest is not finite.
    """
    if _C is None or not logits.is_cpu or logits.dtype not in DTYPE_CODES or logits.stride(1) != 1:
        return _torch_ops.argmax(logits)
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    code = DTYPE_CODES[logits.dtype]
    _C.argmax(logits.data_ptr(), logits.stride(0), out.data_ptr(), rows, size, code)
    return out


def _heads(x: torch.Tensor, head_size: int) -> torch.Tensor:
    return x if x.dim() == 3 else x.view(x.shape[0], -1, head_size)


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

    Raises:
        IndexError: a position is not in the cache.
    """
    query = _heads(query, head_size)
    key = None if key is None else _heads(key, head_size)
    if not _rope_kernel_takes(positions, query, key, cos_sin_cache):
        _torch_ops.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)
        return
    _rope_store(positions, query, key, None, cos_sin_cache, is_neox, None, None)


# Largest code of a KVFormat that csrc/cpu/kv_formats.h knows (CacheFormat in csrc/cpu/types.h).
_LAST_FORMAT = 6
_NVFP4 = 6
_PLAIN_CACHE = (0, 1.0, 1.0, 0, 0, 0, 0)


def _cache_kernel_takes(kv_cache: torch.Tensor, fmt: Any) -> bool:
    if fmt is None:
        return kv_cache.dtype in DTYPE_CODES
    return fmt.code <= _LAST_FORMAT and kv_cache.element_size() == 1


def cache_arguments(
    kv_cache: torch.Tensor, fmt: Any, scales: Any, head_size: int
) -> tuple[tuple[int, int, int, int], tuple[Any, ...]]:
    """Address and strides over B, H and N of a cache's keys, and struct QuantisedCache.

    Strides count elements of the cache, which are bytes where ``fmt`` is given.
    """
    block, head, token, content = kv_cache.stride()
    assert content == 1, "the content of a token's head is dense"
    if fmt is None:
        return (kv_cache.data_ptr(), block, head, token), _PLAIN_CACHE
    # Scales of the layer, where the format has them.
    factors = (1.0, 1.0) if scales is None or fmt.per_token_head else (scales.k, scales.v)
    if fmt.code != _NVFP4:
        assert kv_cache.shape[3] == 2 * fmt.side_bytes(head_size)
        quantised = (fmt.code, *factors, fmt.side_bytes(head_size), 0, 0, 0)
        return (kv_cache.data_ptr(), block, head, token), quantised
    heads = kv_cache.shape[1] // 2
    data, own = nvfp4_split_data_scale(kv_cache[:, :heads])
    assert data.shape[3] * 2 == head_size
    _, own_head, own_token, _ = own.stride()
    apart = own.storage_offset() - data.storage_offset()
    data_block, data_head, data_token, _ = data.stride()
    address = (data.data_ptr(), data_block, data_head, data_token)
    return address, (fmt.code, *factors, heads * head, apart, own_head, own_token)


def _rope_kernel_takes(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
) -> bool:
    return (
        _C is not None
        and query.is_cpu
        and query.dtype in DTYPE_CODES
        and cos_sin_cache.dtype in DTYPE_CODES
        and cos_sin_cache.shape[1] <= min(_MAX_ROTARY, query.shape[2])
        and positions.dtype is torch.int64
        and query.stride(2) == 1
        and (key is None or (key.stride(2) == 1 and key.dtype is query.dtype))
    )


def _rope_store(
    positions: torch.Tensor | None,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    is_neox: bool,
    kv_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    fmt: Any = None,
    scales: Any = None,
) -> None:
    """RoPE of query and key, the store of key and value, or both; checked by the callers."""
    lead = query if key is None else key
    assert lead is not None
    rope = (0, 0, 0, 0, 0, 0)
    if positions is not None and cos_sin_cache is not None:
        rope = (
            positions.data_ptr(),
            cos_sin_cache.data_ptr(),
            cos_sin_cache.stride(0),
            cos_sin_cache.shape[1],
            is_neox,
            DTYPE_CODES[cos_sin_cache.dtype],
        )
    cache = (0, 0, 0, 0, 0, 0)
    block_size, cache_code, quantised = 1, 0, _PLAIN_CACHE
    if kv_cache is not None and slot_mapping is not None:
        assert slot_mapping.shape[0] <= lead.shape[0], "a slot for each token at most"
        address, quantised = cache_arguments(kv_cache, fmt, scales, lead.shape[2])
        cache = (*address, slot_mapping.data_ptr(), slot_mapping.shape[0])
        block_size = kv_cache.shape[2]
        cache_code = DTYPE_CODES[kv_cache.dtype] if fmt is None else 0
    _C.rope_store(
        *rope,
        *_address_of_heads(query),
        0 if query is None else query.shape[1],
        *_address_of_heads(key),
        *_address_of_heads(value),
        0 if key is None else key.shape[1],
        *cache,
        lead.shape[0],
        lead.shape[2],
        block_size,
        DTYPE_CODES[lead.dtype],
        cache_code,
        0 if cos_sin_cache is None else cos_sin_cache.shape[0],
        *quantised,
    )


def _address_of_heads(x: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, token stride and head stride of a (T, heads, D) tensor; zeros for None."""
    if x is None:
        return 0, 0, 0
    token, head, _ = x.stride()
    return x.data_ptr(), token, head


def _store_kernel_takes(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: Any = None,
) -> bool:
    return (
        _C is not None
        and key.is_cpu
        and key.dtype in DTYPE_CODES
        and value.dtype is key.dtype
        and (fmt is None or key.shape[2] <= _MAX_ROTARY)
        and _cache_kernel_takes(kv_cache, fmt)
        and kv_cache.stride(3) == 1
        and key.stride(2) == 1
        and value.stride(2) == 1
        and slot_mapping.dtype is torch.int64
        and slot_mapping.stride(0) == 1
    )


def store_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: Any = None,
    scales: Any = None,
) -> None:
    """Write each token's key and value to its slot.

    Args:
        key, value: (T, K, D), rows may be strided.
        kv_cache: (B, K, N, 2 * D), any strides with a dense last dim; with ``fmt`` single bytes.
        slot_mapping: (S,) int64, S <= T; slot = block * N + offset, -1 is skipped. Tokens at and
            after S are padding.
        fmt, scales: the ``KVFormat`` of a quantised cache and the ``SideScales`` of its layer.
    """
    if _store_kernel_takes(key, value, kv_cache, slot_mapping, fmt):
        _rope_store(None, None, key, value, None, False, kv_cache, slot_mapping, fmt, scales)
    else:
        _torch_ops.store_kv_cache(key, value, kv_cache, slot_mapping, fmt, scales)


def store_latent(latents: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write each token's latent to its slot.

    Args:
        latents: (T, C), rows may be strided.
        kv_cache: (B, N, C), any strides with a dense last dim.
        slot_mapping: as in ``store_kv_cache``.
    """
    if latents.shape[1] % 2:
        _torch_ops.store_latent(latents, kv_cache, slot_mapping)
        return
    # As a key and a value of half the width each, which lie side by side as well.
    key, value = latents.unsqueeze(1).chunk(2, dim=-1)
    store_kv_cache(key, value, kv_cache.unsqueeze(1), slot_mapping)


def rope_and_store(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: Any = None,
    scales: Any = None,
) -> None:
    """Rotate ``query`` (T, Q, D) in place, rotate ``key`` (T, K, D), store key and value.

    ``key`` may or may not be rotated in place. Other arguments as in ``rotary_embedding`` and
    ``store_kv_cache``.
    """
    cache = (kv_cache, slot_mapping, fmt, scales)
    if _store_kernel_takes(key, value, kv_cache, slot_mapping, fmt) and _rope_kernel_takes(
        positions, query, key, cos_sin_cache
    ):
        _rope_store(positions, query, key, value, cos_sin_cache, is_neox, *cache)
    else:
        _torch_ops.rope_and_store(positions, query, key, value, cos_sin_cache, is_neox, *cache)


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
    value_offset: int | None = None,
    fmt: Any = None,
    scales: Any = None,
) -> None:
    """Attention of new tokens over a paged cache that holds their keys and values already.

    Args:
        query: (T, Q, D), rows and heads may be strided.
        kv_cache: (B, K, N, C), any strides with a dense last dim; Q is a multiple of K. The first D
            elements of a content are the key.
        out: (T, Q, Dv), written for the tokens below ``query_start_loc[-1]``.
        query_start_loc: (R + 1,) int32, first token of each request.
        seq_lens: (R,) int32, tokens of each request in the cache, the new ones included.
        block_table: (R, max blocks) int32.
        scale: factor of the scores.
        causal: a token sees itself and what came before it; else all of its request.
        sliding_window: keys a token sees, itself included; 0 for all. Without ``causal`` it
            reaches as far ahead as back.
        logits_soft_cap: c of c * tanh(score / c); 0 for none.
        alibi_slopes: (Q,) float32; adds slope * (key position - query position).
        sinks: (Q,) scores that take part in a head's softmax and have no value.
        value_offset: where the Dv elements of the value begin in a content; None: after the key. 0
            for a latent, which is both.
        fmt, scales: as in ``store_kv_cache``.
    """
    _, num_heads, head_size = query.shape
    value_size = out.shape[-1]
    if value_offset is None:
        value_offset = head_size
    if (
        _C is None
        or not query.is_cpu
        or query.dtype not in DTYPE_CODES
        or not _cache_kernel_takes(kv_cache, fmt)
        or head_size % 8
        or head_size > MAX_HEAD_SIZE
        or value_size > MAX_HEAD_SIZE
        or query.stride(2) != 1
        or kv_cache.stride(3) != 1
    ):
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
            value_offset=value_offset,
            fmt=fmt,
            scales=scales,
        )
        return
    kv_heads = kv_cache.shape[1]
    if fmt is None:
        assert value_offset + value_size <= kv_cache.shape[3] and head_size <= kv_cache.shape[3]
    else:
        assert value_offset == head_size == value_size
        kv_heads //= fmt.head_slots(1)
    # The kernel takes addresses only: what disagrees here would be read beyond its end.
    requests = query_start_loc.shape[0] - 1
    assert num_heads % kv_heads == 0 and out.shape[1] == num_heads
    assert seq_lens.shape[0] >= requests and block_table.shape[0] >= requests
    assert alibi_slopes is None or alibi_slopes.shape[0] == num_heads
    assert sinks is None or sinks.shape[0] == num_heads
    assert out.dtype is query.dtype and out.stride(2) == 1
    assert query_start_loc.dtype is torch.int32 and seq_lens.dtype is torch.int32
    assert block_table.dtype is torch.int32 and block_table.stride(1) == 1
    if sinks is not None and sinks.dtype is not torch.float32:
        sinks = sinks.to(torch.float32)
    address, quantised = cache_arguments(kv_cache, fmt, scales, head_size)
    _C.attention(
        *_address_of_heads(query),
        *_address_of_heads(out),
        *address,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        seq_lens.shape[0],
        num_heads,
        kv_heads,
        head_size,
        kv_cache.shape[2],
        value_offset,
        value_size,
        scale,
        logits_soft_cap,
        sliding_window,
        causal,
        DTYPE_CODES[query.dtype],
        DTYPE_CODES[kv_cache.dtype] if fmt is None else 0,
        *quantised,
    )
