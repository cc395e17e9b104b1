"""Shapes and byte strides of a cache: the address rule, as integers.

    address(layer l, block b, head h, state n, byte c)
        = base + offset + l * layer_stride + b * block_stride + h * head_stride
        + n * state_stride + c

Everything that turns (layer, block, head) into bytes takes the strides from here. Pure: no
torch, no device.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.errors import ConfigError
from vllm.v1.kv_cache.config import KVCacheTensor
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = [
    "compute_layer_kv_cache_shape_bytes",
    "compute_layout_strides",
    "kernel_blocks_per_block",
    "tensor_strides",
]

Strides5 = tuple[int, int, int, int, int]
NO_FIXED_STRIDES: tuple[int | None, ...] = (None, None, None, None, None)


def kernel_blocks_per_block(spec: KVCacheSpec, kernel_block_size: int | None) -> int:
    """Kernel blocks that one manager block is read as; 1 where the spec has no tokens per block.

    Raises:
        ConfigError: the manager block is not a whole number of kernel blocks.
    """
    if kernel_block_size is None or not spec.uses_slot_mapping:
        return 1
    if kernel_block_size <= 0 or spec.block_size % kernel_block_size:
        raise ConfigError(
            f"{spec.where}blocks of {spec.block_size} tokens are not a whole number of kernel "
            f"blocks of {kernel_block_size}: choose a --block-size that is a multiple of "
            f"{kernel_block_size}",
            parameter="block_size",
            value=spec.block_size,
        )
    return spec.block_size // kernel_block_size


def compute_layer_kv_cache_shape_bytes(
    spec: KVCacheSpec, num_blocks: int, kernel_block_size: int | None = None
) -> tuple[int, int, int, int]:
    """Logical shape (B, H, N, C) of one layer with C in bytes; B and N count kernel blocks."""
    ratio = kernel_blocks_per_block(spec, kernel_block_size)
    states = spec.get_num_kernel_states(spec.block_size // ratio)
    return (num_blocks * ratio, spec.num_heads, states, spec.state_content_size_bytes)


def compute_layout_strides(
    spec: KVCacheSpec,
    num_blocks: int,
    num_layers: int,
    layout: KVCacheLayout,
    kernel_block_size: int | None = None,
    fixed_strides: Sequence[int | None] = NO_FIXED_STRIDES,
) -> Strides5:
    """Byte strides in logical order (L, B, H, N, C).

    Dense in the layout's physical order, except that an axis with an entry in ``fixed_strides``
    has that stride, and the axes outside it count on from there. The fixed stride of B is that of
    a *manager* block; the result's is that of a kernel block.

    Raises:
        ConfigError: a fixed stride is smaller than what lies inside it; or blocks are split into
            kernel blocks that would not be equally far apart (the block stride is not the dense
            page), naming layer, page, stride and ratio.
    """
    ratio = kernel_blocks_per_block(spec, kernel_block_size)
    fixed = list(fixed_strides)
    if ratio > 1:
        _check_split(spec, layout, ratio, fixed[1])
        if fixed[1] is not None:
            fixed[1] //= ratio
    shape = (num_layers, *compute_layer_kv_cache_shape_bytes(spec, num_blocks, kernel_block_size))
    strides = [0] * 5
    extent = 1
    for axis in reversed(layout.stride_order):
        stride = fixed[axis]
        # Layers with stride 0 share their bytes on purpose.
        if stride is not None and stride < extent and shape[axis] > 1 and (axis or stride):
            raise ConfigError(
                f"{spec.where}stride {stride} of axis {'LBHNC'[axis]} is smaller than the "
                f"{extent} bytes inside it ({layout})"
            )
        strides[axis] = extent if stride is None else stride
        extent = max(extent, strides[axis] * shape[axis])
    return (strides[0], strides[1], strides[2], strides[3], strides[4])


def _check_split(
    spec: KVCacheSpec, layout: KVCacheLayout, ratio: int, block_stride: int | None
) -> None:
    page = spec.unpadded_page_size_bytes
    compact = layout.is_block_compact or (layout.is_layer_compact and spec.num_heads == 1)
    if not compact or (layout.is_block_outermost and block_stride is None):
        problem = f"layout {layout} does not keep a page together"
    elif block_stride is not None and block_stride != page:
        problem = f"the block stride of {block_stride} bytes is not the dense page of {page}"
    else:
        return
    raise ConfigError(
        f"{spec.where}blocks of {spec.block_size} tokens cannot be split into {ratio} kernel "
        f"blocks, because {problem}: use --block-size {spec.block_size // ratio}, or a "
        "layer-compact layout (LBHNC, LBNHC) without padding",
        parameter="block_size",
        value=spec.block_size,
    )


def tensor_strides(
    tensor: KVCacheTensor,
    spec: KVCacheSpec,
    num_blocks: int,
    layout: KVCacheLayout,
    kernel_block_size: int | None = None,
) -> Strides5:
    """Byte strides (L, B, H, N, C) of the layers of one ``KVCacheTensor``, kernel blocks."""
    return compute_layout_strides(
        spec,
        num_blocks,
        len(tensor.layers),
        layout,
        kernel_block_size,
        (tensor.layer_stride, tensor.block_stride, None, None, None),
    )
