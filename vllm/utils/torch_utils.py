"""Views of cache tensors that several kernels and outside libraries take by the same rule."""

from __future__ import annotations

import torch

__all__ = ["nvfp4_split_data_scale"]


def nvfp4_split_data_scale(side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Data ``(B, H, N, D/2)`` and scales ``(B, H, N, D/16)`` of one side of an nvfp4 cache.

    A side of a block is all its data, heads outermost, then all its scales in the same order.
    Both are views.

    Args:
        side: ``(B, H, N, D/2 + D/16)`` single bytes: K heads or V heads of a cache
            ``(B, 2H, N, F)``; blocks at any distance, each dense inside.

    Raises:
        ValueError: a block of the side is not one run of bytes, or F is not that of any head size.
    """
    blocks, heads, tokens, width = side.shape
    stride = side.stride()
    dense = (tokens * width, width, 1)
    if side.element_size() != 1 or width % 9:
        raise ValueError(
            f"a side of an nvfp4 cache has D/2 + D/16 single bytes, a multiple of 9, for a head "
            f"and token; not {width} of {side.dtype}"
        )
    sizes = (heads, tokens, width)
    if any(n > 1 and s != d for n, s, d in zip(sizes, stride[1:], dense, strict=True)):
        raise ValueError(
            f"a side of an nvfp4 cache is one run of bytes in each block: strides "
            f"{stride[1:]} of {sizes} are not dense; choose a layout such as HND that keeps "
            "a page together"
        )
    data, scale = width * 8 // 9, width // 9
    start = side.storage_offset()
    return (
        side.as_strided((blocks, heads, tokens, data), (stride[0], tokens * data, data, 1), start),
        side.as_strided(
            (blocks, heads, tokens, scale),
            (stride[0], tokens * scale, scale, 1),
            start + heads * tokens * data,
        ),
    )
