"""What identifies a cache to everybody outside: plain data, one canonical JSON, a fingerprint.

Connectors, offloading and plug-ins read descriptors and never a tensor's shape: with two KV
heads, or one, shapes lie. Two caches may exchange blocks only if ``content_differences`` is
empty. Pure: no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgspec

from vllm.errors import KVTransferError
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.content import StateSlice
from vllm.v1.kv_cache.runs import ByteRun, merge_runs, runs_by_layer
from vllm.v1.kv_cache.strides import compute_layer_kv_cache_shape_bytes, tensor_strides

__all__ = [
    "CacheDescriptor",
    "GroupDescriptor",
    "HeadAxis",
    "LayerDescriptor",
    "content_differences",
    "describe",
]

VERSION = 1


class _Versioned(msgspec.Struct):
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAxis:
    """Heads can be moved one by one: head h of side s starts at (s * count + h) * stride."""

    count: int
    """Heads of one side on this rank."""
    stride: int
    sides: int = 1
    """2 where K heads and V heads lie apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDescriptor:
    """One layer's pages. All sizes and strides in bytes, offsets from the cache's base.

    Kernel block j of block b, head slot h, state n:
    ``offset + b * block_stride + j * kernel_block_stride + h * head_stride + n * state_stride``.
    """

    name: str
    group: int
    kind: str
    content_format: str
    parts: tuple[tuple[str, int], ...]
    """Names and bytes of what one (head slot, state) consists of, in order."""
    dtype: str
    tokens_per_block: int
    tokens_per_state: str
    """A fraction such as "1", "4" or "1/2"; "-1" where states don't count tokens."""
    offset: int
    block_stride: int
    kernel_blocks_per_block: int
    kernel_block_stride: int
    num_head_slots: int
    head_stride: int
    num_states: int
    """Of a kernel block."""
    state_stride: int
    content_bytes: int
    span_bytes: int
    """Bytes with content in one block; what a transfer moves."""
    page_bytes: int
    runs: tuple[ByteRun, ...]
    head_axis: HeadAxis | None
    """None: not cut by head (one latent, a state page, nvfp4)."""
    states: tuple[StateSlice, ...] = ()
    state_layout: str | None = None
    """"SD" or "DS" of the convolution state."""

    def content_key(self) -> dict[str, Any]:
        """What must be equal for the bytes of one (head, state) to mean the same."""
        return {
            "kind": self.kind,
            "content_format": self.content_format,
            # A state page's size follows from the rank's share of its states.
            "parts": [] if self.states else [list(part) for part in self.parts],
            "dtype": self.dtype,
            "tokens_per_state": self.tokens_per_state,
            "states": [
                [state.dtype_name, len(state.shape), [part.name for part in state.segments]]
                for state in self.states
            ],
            "state_layout": self.state_layout,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDescriptor:
    """Layers that share a block table."""

    index: int
    kind: str
    block_size: int
    kernel_block_size: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDescriptor:
    """One worker's cache."""

    version: int
    layout: str
    base: int
    """Address of the backing; 0 where only offsets matter."""
    size_bytes: int
    num_blocks: int
    bytes_per_block: int
    groups: tuple[GroupDescriptor, ...]
    layers: tuple[LayerDescriptor, ...]

    def layer(self, name: str) -> LayerDescriptor:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def group_runs(self, group: int | None) -> tuple[ByteRun, ...]:
        """Runs of a block that this group owns, over all its layers; None: whoever owns it."""
        layers = (layer for layer in self.layers if group in (None, layer.group))
        return merge_runs(run for layer in layers for run in layer.runs)

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, so equal descriptors are equal strings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CacheDescriptor:
        """Read what ``to_json`` wrote.

        Raises:
            KVTransferError: it is no descriptor, or of another version.
        """
        try:
            version = msgspec.json.decode(text, type=_Versioned).version
            if version != VERSION:
                raise KVTransferError(
                    f"cache descriptor has version {version}, this engine reads {VERSION}"
                )
            return msgspec.json.decode(text, type=cls)
        except (ValueError, TypeError) as error:
            raise KVTransferError(f"not a cache descriptor: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 over everything but the base address, in hex."""
        text = dataclasses.replace(self, base=0).to_json()
        return hashlib.sha256(text.encode()).hexdigest()


def describe(config: KVCacheConfig, base_ptr: int = 0) -> CacheDescriptor:
    """The descriptor of a planned cache whose backing starts at ``base_ptr``."""
    runs = runs_by_layer(config)
    groups = tuple(
        GroupDescriptor(
            index=index,
            kind=group.kv_cache_spec.manager_spec.kind.value,
            block_size=group.kv_cache_spec.block_size,
            kernel_block_size=config.kernel_block_size(index),
            layers=tuple(group.layer_names),
        )
        for index, group in enumerate(config.kv_cache_groups)
    )
    layers: list[LayerDescriptor] = []
    for tensor in config.kv_cache_tensors:
        group_id = config.group_of(tensor.layers[0])
        spec = config.kv_cache_groups[group_id].spec_of(tensor.layers[0])
        kernel = config.kernel_block_size(group_id) if spec.uses_slot_mapping else None
        ratio = config.kernel_blocks_per_block(group_id) if spec.uses_slot_mapping else 1
        strides = tensor_strides(tensor, spec, config.num_blocks, config.kv_cache_layout, kernel)
        shape = compute_layer_kv_cache_shape_bytes(spec, config.num_blocks, kernel)
        axis = None
        if spec.head_axis_is_sliceable:
            sides = spec.head_sides
            axis = HeadAxis(count=shape[1] // sides, stride=strides[2], sides=sides)
        layers.extend(
            LayerDescriptor(
                name=name,
                group=group_id,
                kind=spec.kind.value,
                content_format=spec.content_format.value,
                parts=spec.content_parts,
                dtype=spec.storage_dtype,
                tokens_per_block=spec.block_size,
                tokens_per_state=str(Fraction(spec.tokens_per_state)),
                offset=tensor.offset + index * strides[0],
                block_stride=strides[1] * ratio,
                kernel_blocks_per_block=ratio,
                kernel_block_stride=strides[1],
                num_head_slots=shape[1],
                head_stride=strides[2],
                num_states=shape[2],
                state_stride=strides[3],
                content_bytes=shape[3],
                span_bytes=spec.unpadded_page_size_bytes,
                page_bytes=spec.page_size_bytes,
                runs=runs[name],
                head_axis=axis,
                states=spec.state_table,
                state_layout=spec.state_layout,
            )
            for index, name in enumerate(tensor.layers)
        )
    return CacheDescriptor(
        version=VERSION,
        layout=config.kv_cache_layout.value,
        base=base_ptr,
        size_bytes=config.backing_size_bytes,
        num_blocks=config.num_blocks,
        bytes_per_block=config.bytes_per_block,
        groups=groups,
        layers=tuple(layers),
    )


def content_differences(local: CacheDescriptor, remote: CacheDescriptor) -> list[str]:
    """Why bytes of layers that both have do not mean the same; empty if they do.

    Head counts, layouts, block counts and offsets may differ: a transfer plan bridges those.
    """
    others = {layer.name: layer for layer in remote.layers}
    differences: list[str] = []
    for layer in local.layers:
        other = others.get(layer.name)
        if other is None:
            continue
        mine, theirs = layer.content_key(), other.content_key()
        differences.extend(
            f"{layer.name}: {key} is {mine[key]} here and {theirs[key]} there"
            for key in mine
            if mine[key] != theirs[key]
        )
    if not {layer.name for layer in local.layers} & others.keys():
        differences.append("no layer has the same name on both sides")
    return differences
