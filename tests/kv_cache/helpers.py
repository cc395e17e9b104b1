"""Specs, configs and the address oracle that the KV-cache tests share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.config import (
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.v1.kv_cache.placement import bytes_per_block, place_layers
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout


def make_config(
    max_model_len: int = 4096,
    max_num_batched_tokens: int = 512,
    disable_hybrid_kv_cache_manager: bool = False,
    decode_context_parallel_size: int = 1,
    **cache: Any,
) -> VllmConfig:
    hf_config: Any = SimpleNamespace(max_source_positions=100)
    return VllmConfig(
        model_config=ModelConfig(
            model="m",
            model_path="m",
            tokenizer="m",
            hf_config=hf_config,
            hf_text_config=hf_config,
            architecture="LlamaForCausalLM",
            dtype_name="bfloat16",
            max_model_len=max_model_len,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=8,
            max_model_len=max_model_len,
            disable_hybrid_kv_cache_manager=disable_hybrid_kv_cache_manager,
        ),
        parallel_config=ParallelConfig(decode_context_parallel_size=decode_context_parallel_size),
        cache_config=CacheConfig(**cache),
    )


def full(
    heads: int = 2, head_size: int = 4, block_size: int = 16, dtype: Any = "float32", **kw: Any
) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=head_size, dtype=dtype, **kw
    )


def sliding(
    heads: int = 2, head_size: int = 4, window: int = 64, block_size: int = 16, **kw: Any
) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_size,
        num_kv_heads=heads,
        head_size=head_size,
        dtype=kw.pop("dtype", "float32"),
        sliding_window=window,
        **kw,
    )


def mamba(
    shapes: Any = ((3, 8), (2, 4)), dtypes: Any = ("bfloat16", "float32"), **kw: Any
) -> MambaSpec:
    return MambaSpec(block_size=kw.pop("block_size", 4096), shapes=shapes, dtypes=dtypes, **kw)


def placed(
    groups: list[dict[str, KVCacheSpec]],
    layout: KVCacheLayout,
    num_blocks: int,
    kernel_block_sizes: tuple[int, ...] = (),
) -> KVCacheConfig:
    """A config with exactly these groups: placement without the resolver's choices."""
    specs = {name: spec for group in groups for name, spec in group.items()}
    tensors = place_layers([list(group) for group in groups], specs, layout, num_blocks)
    group_specs = []
    for group in groups:
        members = list(group.values())
        spec = members[0]
        if len(set(members)) > 1:
            spec = UniformTypeKVCacheSpecs(block_size=spec.block_size, kv_cache_specs=group)
        group_specs.append(KVCacheGroupSpec(list(group), spec))
    assert all(
        t.size == bytes_per_block([list(g) for g in groups], specs) * num_blocks for t in tensors
    )
    return KVCacheConfig(
        num_blocks,
        tensors,
        group_specs,
        kv_cache_layout=layout,
        kernel_block_sizes=kernel_block_sizes,
    )


class Oracle:
    """Byte addresses from first principles: nested boxes, nothing shared with the product.

    A layout's name lists the boxes from the outside in. ``room`` is the bytes that a page takes
    where a page is one box (it may be padded), ``block_room`` those of a whole block where
    blocks are outermost, ``before`` those of earlier layers in it.
    """

    def __init__(
        self,
        layout: str,
        sizes: dict[str, int],
        room: int | None = None,
        block_room: int | None = None,
        before: int = 0,
        splits: int = 1,
    ) -> None:
        self.layout, self.sizes, self.splits = layout, sizes, splits
        self.room, self.block_room, self.before = room, block_room, before

    def address(self, layer: int, block: int, head: int, state: int, byte: int) -> int:
        """Of a manager block; with splits, ``state`` counts through all its kernel blocks."""
        at = {"L": layer, "B": block, "H": head, "N": state, "C": byte}
        if self.splits > 1:
            per_kernel = self.sizes["N"] // self.splits
            kernel, at["N"] = divmod(state, per_kernel)
            dense = self.sizes["H"] * per_kernel * self.sizes["C"]
            inner = {**self.sizes, "N": per_kernel}
            page = _horner(self.layout[2:], at, inner) + kernel * dense
        else:
            page = _horner(self.layout[2:], at, self.sizes)
        if self.room is not None and self.block_room is not None:
            return block * self.block_room + self.before + layer * self.room + page
        if self.room is not None:
            outer = layer * self.sizes["B"] + block
            if self.layout[0] == "B":
                outer = block * self.sizes["L"] + layer
            return outer * self.room + page
        if self.block_room is not None:
            return block * self.block_room + self.before + _horner(self.layout[1:], at, self.sizes)
        return _horner(self.layout, at, self.sizes)


def _horner(axes: str, at: dict[str, int], sizes: dict[str, int]) -> int:
    position = 0
    for axis in axes:
        position = position * sizes[axis] + at[axis]
    return position
