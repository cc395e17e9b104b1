"""Named conversions of cache contents between number formats, done by the engine that receives.

Owns which pairs there are and what they compute. A conversion changes numbers one by one and moves
none: element i of a run there is element i of the run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache.content import ContentFormat
from vllm.v1.kv_cache.descriptors import LayerDescriptor

if TYPE_CHECKING:
    import torch

__all__ = ["Conversion", "convert", "find_conversion", "format_name", "stretch"]

_PLAIN = {"bfloat16": 2, "float16": 2, "float32": 4}
_SCALED = {"fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """From one number format to another; a scaled one's value is number * scale of the side."""

    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.source} to {self.target}"

    @property
    def source_bytes(self) -> int:
        """Of an element."""
        return {**_PLAIN, **_SCALED}[self.source]

    @property
    def target_bytes(self) -> int:
        return {**_PLAIN, **_SCALED}[self.target]


def format_name(cache_dtype: str, model_dtype: str) -> str:
    """The format of plain and scaled layers under ``--kv-cache-dtype``, by one name each."""
    if cache_dtype == "auto":
        return model_dtype
    return {"fp8": "fp8_e4m3", "fp8_inc": "fp8_e4m3"}.get(cache_dtype, cache_dtype)


def find_conversion(
    source: LayerDescriptor, target: LayerDescriptor, formats: tuple[str, str]
) -> Conversion | None:
    """What makes the bytes of ``source`` those of ``target``; None where nothing can or need.

    Args:
        formats: ``format_name`` of the two engines. Layers that are left out of quantisation keep
            their own dtype.
    """
    both = (source.content_format, target.content_format)
    if both != (ContentFormat.KV_PER_TOKEN, ContentFormat.KV_PER_TOKEN):
        return None
    there, here = (
        name if layer.dtype == "uint8" else layer.dtype
        for layer, name in zip((source, target), formats, strict=True)
    )
    if (there in _PLAIN and here in _SCALED) or (there in _SCALED and here in _PLAIN):
        return Conversion(source=there, target=here)
    return None


def stretch(layer: LayerDescriptor, factor: int, dtype: str) -> LayerDescriptor:
    """The same geometry with every byte ``factor`` times: elements as wide as the other side's."""
    axis = layer.head_axis
    return replace(
        layer,
        dtype=dtype,
        parts=tuple((name, size * factor) for name, size in layer.parts),
        offset=layer.offset * factor,
        block_stride=layer.block_stride * factor,
        kernel_block_stride=layer.kernel_block_stride * factor,
        head_stride=layer.head_stride * factor,
        state_stride=layer.state_stride * factor,
        content_bytes=layer.content_bytes * factor,
        span_bytes=layer.span_bytes * factor,
        page_bytes=layer.page_bytes * factor,
        runs=(),
        head_axis=None if axis is None else replace(axis, stride=axis.stride * factor),
    )


def convert(
    conversion: Conversion, packed: torch.Tensor, scales: torch.Tensor | Sequence[float]
) -> torch.Tensor:
    """Numbers in the other format.

    Args:
        packed: int8 ``(units, bytes)`` in the format of the source, contiguous.
        scales: float32 ``(elements of a unit,)`` of the scaled side.

    Returns:
        int8 ``(units, bytes)`` in the format of the target. What is too large for a scaled format
        becomes its largest number, as where the engine stores its own.
    """
    import torch

    dtypes = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
    factors = torch.as_tensor(scales, dtype=torch.float32, device=packed.device)
    numbers = packed.view(dtypes[conversion.source]).float()
    if conversion.target in _SCALED:
        largest = torch.finfo(dtypes[conversion.target]).max
        numbers = (numbers / factors).clamp_(-largest, largest)
    else:
        numbers *= factors
    return numbers.to(dtypes[conversion.target]).view(torch.int8)
