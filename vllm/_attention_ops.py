"""RoPE, the store of keys and values in a paged cache, and attention over it.

Owns how a cache's address, strides and number format are told to the kernels. Like ``_custom_ops``,
whose names these are too, it checks what C++ will not, and must not know layers or caches' owners.

Letters: T tokens, Q query heads, K KV heads, D head size, B cache blocks, N tokens per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm import _extension, _torch_ops
from vllm._extension import DTYPE_CODES, address_of
from vllm.utils.torch_utils import nvfp4_split_data_scale

if TYPE_CHECKING:
    from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales

__all__ = [
    "MAX_HEAD_SIZE",
    "cache_arguments",
    "paged_attention",
    "rope_and_store",
    "rotary_embedding",
    "store_kv_cache",
    "store_latent",
]

# Of keys, and of values: kMaxHead in csrc/cpu/attention_tile.h.
MAX_HEAD_SIZE = 576
_MAX_ROTARY = 1024


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


def _cache_kernel_takes(kv_cache: torch.Tensor, fmt: KVFormat | None) -> bool:
    if fmt is None:
        return kv_cache.dtype in DTYPE_CODES
    return fmt.code <= _LAST_FORMAT and kv_cache.element_size() == 1


def cache_arguments(
    kv_cache: torch.Tensor, fmt: KVFormat | None, scales: SideScales | None, head_size: int
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
        _extension.kernels is not None
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
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
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
    _extension.kernels.rope_store(
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
    fmt: KVFormat | None = None,
) -> bool:
    return (
        _extension.kernels is not None
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
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
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
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
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


def _attention_kernel_takes(
    query: torch.Tensor, kv_cache: torch.Tensor, value_size: int, fmt: KVFormat | None
) -> bool:
    head_size = query.shape[2]
    return (
        _extension.kernels is not None
        and query.is_cpu
        and query.dtype in DTYPE_CODES
        and _cache_kernel_takes(kv_cache, fmt)
        and head_size % 8 == 0
        and head_size <= MAX_HEAD_SIZE
        and value_size <= MAX_HEAD_SIZE
        and query.stride(2) == 1
        and kv_cache.stride(3) == 1
    )


def _check_batch(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor
) -> None:
    requests = query_start_loc.shape[0] - 1
    assert seq_lens.shape[0] >= requests and block_table.shape[0] >= requests
    assert query_start_loc.dtype is torch.int32 and seq_lens.dtype is torch.int32
    assert block_table.dtype is torch.int32 and block_table.stride(1) == 1


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
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
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
    if not _attention_kernel_takes(query, kv_cache, value_size, fmt):
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
    assert num_heads % kv_heads == 0 and out.shape[1] == num_heads
    assert alibi_slopes is None or alibi_slopes.shape[0] == num_heads
    assert sinks is None or sinks.shape[0] == num_heads
    assert out.dtype is query.dtype and out.stride(2) == 1
    _check_batch(query_start_loc, seq_lens, block_table)
    if sinks is not None and sinks.dtype is not torch.float32:
        sinks = sinks.to(torch.float32)
    address, quantised = cache_arguments(kv_cache, fmt, scales, head_size)
    _extension.kernels.attention(
        *_address_of_heads(query),
        *_address_of_heads(out),
        *address,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        address_of(alibi_slopes),
        address_of(sinks),
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
