"""PyTorch forms of the operators in ``vllm._custom_ops``: the fallback, and the reference in tests.

Every function computes in float32, or in float64 where its input is float64, and works on any
device. Must not know the extension. Letters: T tokens, Q query heads, K KV heads, D head size,
B cache blocks, N tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dim, in fp32 inside; x (..., h) may be strided; weight (h,).

    ``out`` may be ``x`` itself.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight
    result = wide.to(x.dtype)
    return result if out is None else out.copy_(result)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """In place: ``residual += x``, then ``x = rms_norm(residual)``; both (T, h)."""
    residual.add_(x)
    rms_norm(residual, weight, eps, out=x)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :i]) * x[..., i:]``; x (..., 2 * i) -> (..., i)."""
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(x[..., :i]) * x[..., i:]``, gelu by its tanh formula; x (..., 2 * i) -> (..., i)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def swiglu_oai_and_mul(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)``; x (..., 2 * i), gate before up -> (..., i).

    The gate is at most ``limit``, up within ``[-limit, limit]``.
    """
    gate, up = x.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row, the first of equal ones: (T, v) -> (T,) int64.

    A NaN counts as the largest; -1 where the largest is not finite.
    """
    best = logits.argmax(dim=-1, keepdim=True)
    chosen = logits.gather(-1, best)
    # Neither NaN nor infinity less itself is zero.
    return torch.where(chosen.sub_(chosen) == 0, best, -1).squeeze_(-1)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, is_neox: bool
) -> None:
    """Rotate ``x`` (T, heads, D) in place; cos, sin (T, 1, rotary_dim / 2) in fp32."""
    part = x[..., :rotary_dim]
    wide = part.to(cos.dtype)
    if is_neox:
        first, second = wide.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = wide[..., ::2], wide[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        rotated = rotated.flatten(-2)
    part.copy_(rotated)


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
    rotary_dim = cos_sin_cache.shape[-1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    cos, sin = cos_sin_cache[positions].to(wide).unsqueeze(1).chunk(2, dim=-1)
    for tensor in (query, key):
        if tensor is not None:
            heads = tensor if tensor.dim() == 3 else tensor.unflatten(-1, (-1, head_size))
            _rotate(heads, cos, sin, rotary_dim, is_neox)


def store_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
) -> None:
    """Write each token's key and value to its slot.

    Args:
        key, value: (T, K, D), rows may be strided.
        kv_cache: (B, K, N, 2 * D), any strides with a dense last dim.
        slot_mapping: (S,) int64, S <= T; slot = block * N + offset, -1 is skipped. Tokens at and
            after S are padding.
        fmt, scales: the ``KVFormat`` of a cache of single bytes, (B, K, N, content), and the
            ``SideScales`` of its layer.
    """
    block_size = kv_cache.shape[2]
    head_size = key.shape[-1]
    num = slot_mapping.shape[0]
    keep = (slot_mapping >= 0).nonzero().squeeze(-1)
    slots = slot_mapping[keep]
    blocks, offsets = slots // block_size, slots % block_size
    if fmt is not None:
        raw = kv_cache.view(torch.uint8)
        fmt.store(raw, blocks, offsets, key[:num][keep], value[:num][keep], scales)
        return
    kv_cache[blocks, :, offsets, :head_size] = key[:num][keep].to(kv_cache.dtype)
    kv_cache[blocks, :, offsets, head_size:] = value[:num][keep].to(kv_cache.dtype)


def store_latent(latents: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write latents (T, C) to slots of ``kv_cache`` (B, N, C); as ``store_kv_cache``."""
    keep = (slot_mapping >= 0).nonzero().squeeze(-1)
    slots, block_size = slot_mapping[keep], kv_cache.shape[1]
    rows = latents[: slot_mapping.shape[0]][keep].to(kv_cache.dtype)
    kv_cache[slots // block_size, slots % block_size] = rows


def rope_and_store(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
) -> None:
    """Rotate ``query`` (T, Q, D) in place, rotate ``key`` (T, K, D), store key and value.

    ``key`` may or may not be rotated in place. Other arguments as in ``rotary_embedding`` and
    ``store_kv_cache``.
    """
    rotary_embedding(positions, query, key, query.shape[-1], cos_sin_cache, is_neox)
    store_kv_cache(key, value, kv_cache, slot_mapping, fmt, scales)


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
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
    value_offset: int | None = None,
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
        sliding_window: keys a token sees, itself included; 0 for all.
        logits_soft_cap: c of c * tanh(score / c); 0 for none.
        alibi_slopes: (Q,) float32; adds slope * (key position - query position).
        sinks: (Q,) float32; a score per head that takes part in the softmax and has no value.
        fmt, scales: as in ``store_kv_cache``.
        value_offset: where the Dv elements of the value begin in a content; None: after the key. 0
            for a latent, which is both.
    """
    block_size, head_size = kv_cache.shape[2], query.shape[-1]
    value_at = head_size if value_offset is None else value_offset
    kv_heads = kv_cache.shape[1] if fmt is None else kv_cache.shape[1] // fmt.head_slots(1)
    group = query.shape[1] // kv_heads
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    starts = query_start_loc.tolist()
    for index, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        num_blocks = -(-seq_len // block_size)
        pages = kv_cache[block_table[index, :num_blocks].long()]
        if fmt is None:
            states = pages.transpose(1, 2).flatten(0, 1)[:seq_len].to(wide)
        else:
            states = fmt.read(pages.view(torch.uint8), scales)[:seq_len].to(wide)
        key, value = (
            part.repeat_interleave(group, dim=1)
            for part in (
                states[..., :head_size],
                states[..., value_at : value_at + out.shape[-1]],
            )
        )
        scores = torch.einsum("tqd,sqd->qts", query[first:last].to(wide), key) * scale
        if logits_soft_cap > 0:
            scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
        key_pos = torch.arange(seq_len, device=query.device)
        # An encoder's output may be shorter than the queries: they have no position in it.
        query_pos = torch.arange(seq_len - (last - first), seq_len, device=query.device)
        distance = key_pos[None, :] - query_pos[:, None]
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.to(wide)[:, None, None] * distance
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance > 0
        if sliding_window > 0:
            hidden |= distance <= -sliding_window
            if not causal:
                hidden |= distance >= sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.to(wide)[:, None, None].expand(-1, last - first, 1)
            weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        out[first:last] = torch.einsum("qts,sqd->tqd", weights, value).to(out.dtype)
