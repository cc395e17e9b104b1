"""Tensors over the backing allocation: the one view constructor, and what layers do with a view.

Every function here returns views. None copies: strides come from ``strides.py``, or from the
tensor that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vllm.errors import ConfigError
from vllm.v1.kv_cache.config import KVCacheTensor
from vllm.v1.kv_cache.content import dtype_itemsize, to_torch_dtype
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.strides import compute_layer_kv_cache_shape_bytes, tensor_strides
from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = [
    "canonicalize_singleton_dim_strides",
    "create_kv_cache_views",
    "drop_head_dim",
    "group_kernel_blocks",
    "map_kv_caches_to_kernel_blocks",
    "part_views",
    "split_kv",
    "state_views",
    "strided_view",
]


def strided_view(
    raw: torch.Tensor,
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    what: str = "view",
) -> torch.Tensor:
    """A view of ``raw`` (1-D, single bytes) with byte offset and byte strides, as ``dtype``.

    ``shape`` counts elements; ``strides`` count bytes.

    Raises:
        ConfigError: the view would end outside ``raw``, or the dtype does not divide the address
            of ``raw``, the offset or a stride.
    """
    item = dtype.itemsize
    start = raw.storage_offset() + offset
    uneven = [s for s, n in zip(strides, shape, strict=True) if n > 1 and s % item]
    if start % item or uneven:
        raise ConfigError(
            f"{what}: offset {start} or strides {list(strides)} are not multiples of the {item} "
            f"bytes of {dtype}"
        )
    last = offset + item + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset < 0 or (last > raw.numel() and 0 not in shape):
        raise ConfigError(
            f"{what}: ends at byte {last} of an allocation of {raw.numel()}; shape "
            f"{tuple(shape)}, byte strides {tuple(strides)}, offset {offset}"
        )
    whole = raw.new_empty(0, dtype=dtype).set_(raw.untyped_storage())
    return whole.as_strided(tuple(shape), tuple(s // item for s in strides), start // item)


def create_kv_cache_views(
    raw: torch.Tensor,
    spec: KVCacheSpec,
    num_blocks: int,
    layout: KVCacheLayout,
    kv_cache_tensor: KVCacheTensor,
    kernel_block_size: int | None = None,
) -> list[torch.Tensor]:
    """One logical ``(B, H, N, C)`` view for each layer of ``kv_cache_tensor``.

    Args:
        raw: the whole backing, 1-D int8.
        kernel_block_size: tokens of a block as kernels read it; B and N count kernel blocks.

    Returns:
        views in the spec's storage dtype, C in elements; dim 0 is always the (kernel) block.
    """
    shape = compute_layer_kv_cache_shape_bytes(spec, num_blocks, kernel_block_size)
    strides = tensor_strides(kv_cache_tensor, spec, num_blocks, layout, kernel_block_size)
    dtype = to_torch_dtype(spec.storage_dtype)
    elements = (*shape[:3], shape[3] // dtype.itemsize)
    byte_strides = (*strides[1:4], dtype.itemsize)
    return [
        strided_view(
            raw,
            kv_cache_tensor.offset + index * strides[0],
            elements,
            byte_strides,
            dtype,
            f"KV cache of layer {name}",
        )
        for index, name in enumerate(kv_cache_tensor.layers)
    ]


def split_kv(
    kv_cache: torch.Tensor, head_size: int, head_size_v: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K ``(B, N, H, D)`` and V ``(B, N, H, Dv)`` of a packed ``(B, H, N, D + Dv)`` cache."""
    width_v = head_size if head_size_v is None else head_size_v
    key, value = kv_cache.transpose(1, 2).split([head_size, width_v], dim=-1)
    return key, value


def part_views(
    kv_cache: torch.Tensor,
    content_parts: Sequence[tuple[str, int]],
    dtypes: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Every part of a cache's content as a view ``(B, H, N, width)``: K, its scales, V, ...

    Strides and offset are the tensor's own, so padded, packed and split pages need no care.

    Args:
        kv_cache: ``(B, H, N, C)``.
        content_parts: names and bytes, as ``KVCacheSpec.content_parts`` says.
        dtypes: of parts that are not the cache's; by default scales (``*_scale``) are float32.

    Raises:
        ConfigError: the parts are not the content, or a dtype does not divide where its part lies.
    """
    item = kv_cache.dtype.itemsize
    content = int(kv_cache.shape[-1]) * item
    if sum(size for _, size in content_parts) != content:
        raise ConfigError(f"parts {list(content_parts)} do not make up {content} bytes of content")
    raw = kv_cache.new_empty(0, dtype=torch.int8).set_(kv_cache.untyped_storage())
    start = int(kv_cache.storage_offset()) * item
    outer = [int(stride) * item for stride in kv_cache.stride()[:-1]]
    views, offset = {}, 0
    for name, size in content_parts:
        given = (dtypes or {}).get(name)
        default = torch.float32 if name.endswith("_scale") else kv_cache.dtype
        dtype = default if given is None else to_torch_dtype(given)
        views[name] = strided_view(
            raw,
            start + offset,
            (*kv_cache.shape[:-1], size // dtype.itemsize),
            (*outer, dtype.itemsize),
            dtype,
            f"part {name}",
        )
        offset += size
    return views


def state_views(
    page: torch.Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[Any]
) -> tuple[torch.Tensor, ...]:
    """Cut the states out of a state layer's page.

    Args:
        page: int8 ``(B, 1, 1, page_size_bytes)``; rows may be farther apart than their length.
        shapes, dtypes: of the states, in the order of ``MambaSpec``.

    Returns:
        tuple of ``(B, *shape_i)`` views; stride(0) is the row stride in elements of dtype_i,
        inner axes are dense. Bytes after the last state belong to nobody.

    Raises:
        ConfigError: a state does not fit, or its dtype does not divide its offset or the row
            stride.
    """
    if page.dim() != 4 or page.shape[1:3] != (1, 1) or page.dtype.itemsize != 1:
        raise ConfigError(
            f"a state layer binds single bytes (B, 1, 1, page), not {tuple(page.shape)} "
            f"of {page.dtype}"
        )
    rows = page.squeeze(2).squeeze(1)
    views, offset = [], 0
    for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        size = math.prod(shape) * dtype_itemsize(dtype)
        if offset + size > rows.shape[1]:
            raise ConfigError(
                f"state {index} of shape {tuple(shape)} ends at byte {offset + size} of a page "
                f"of {rows.shape[1]}"
            )
        inner = [math.prod(shape[axis + 1 :]) * dtype_itemsize(dtype) for axis in range(len(shape))]
        raw = page.new_empty(0).set_(page.untyped_storage())
        views.append(
            strided_view(
                raw,
                int(page.storage_offset()) + offset,
                (int(rows.shape[0]), *shape),
                (int(rows.stride(0)), *inner),
                to_torch_dtype(dtype),
                f"state {index} of shape {tuple(shape)}",
            )
        )
        offset += size
    return tuple(views)


def drop_head_dim(kv_cache: torch.Tensor) -> torch.Tensor:
    """The ``(B, N, C)`` view of a latent cache ``(B, 1, N, C)``: what an MLA layer binds."""
    if kv_cache.dim() != 4 or kv_cache.shape[1] != 1:
        raise ConfigError(f"a latent cache is (B, 1, N, C), not {tuple(kv_cache.shape)}")
    return kv_cache.squeeze(1)


def group_kernel_blocks(cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """View a cache of kernel blocks ``(B * r, ...)`` by manager blocks: ``(B, r, ...)``.

    Where manager and kernel blocks are the same (r = 1), the cache itself. Kernel block j of
    manager block b is ``[b, j]``.

    Raises:
        ConfigError: dim 0 is not a multiple of ``num_blocks``.
    """
    if cache.shape[0] % num_blocks:
        raise ConfigError(
            f"dim 0 of a cache of shape {tuple(cache.shape)} is not a multiple of the "
            f"{num_blocks} blocks"
        )
    ratio = cache.shape[0] // num_blocks
    if ratio == 1:
        return cache
    stride = cache.stride(0)
    return cache.as_strided(
        (num_blocks, ratio, *cache.shape[1:]), (stride * ratio, *cache.stride())
    )


def map_kv_caches_to_kernel_blocks(
    kv_caches: Mapping[str, torch.Tensor], kernel_blocks_per_block: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Undo ``group_kernel_blocks`` for each layer: ``(B, r, ...)`` to ``(B * r, ...)``."""

    def mapped(cache: torch.Tensor, ratio: int) -> torch.Tensor:
        if ratio == 1:
            return cache
        return cache.as_strided((cache.shape[0] * ratio, *cache.shape[2:]), cache.stride()[1:])

    return {name: mapped(cache, kernel_blocks_per_block[name]) for name, cache in kv_caches.items()}


def canonicalize_singleton_dim_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same view with the stride that a dense tensor would have on every axis of size 1.

    Such a stride is never used for an address, but TMA descriptors check it (16-byte rule).
    """
    strides = list(tensor.stride())
    for axis in range(tensor.dim() - 1, -1, -1):
        if tensor.shape[axis] == 1:
            inner = axis + 1
            strides[axis] = strides[inner] * tensor.shape[inner] if inner < tensor.dim() else 1
    return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())


def shares_storage(tensors: Iterable[torch.Tensor]) -> bool:
    """All tensors lie in one allocation; the check after any operation on a cache."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) <= 1
