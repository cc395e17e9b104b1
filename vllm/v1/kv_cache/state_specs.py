"""Specs of state caches, and of groups of layers whose pages differ.

The same rules as ``attention_specs``: arithmetic on integers, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import (
    ITEMSIZE,
    ContentFormat,
    KVCacheSpecKind,
    Segment,
    StateSlice,
    cdiv,
    check_counts,
    dtype_itemsize,
    dtype_name,
    round_up,
)
from vllm.v1.kv_cache.spec import KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class MambaSpec(KVCacheSpec):
    """A fixed state per request: Mamba 1/2, short convolution, gated delta net, linear attention.

    The page is one int8 row ``(B, 1, 1, page)`` that holds the states back to back, in order:
    page = sum(prod(shape_i) * itemsize_i), or ``page_size_padded``. Nothing is put between
    states, so each offset must be a multiple of its dtype, and so must the page, whose multiples
    the rows start at; anything else is refused here.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...] = field(compare=False)
    """torch.dtype or name, one for each shape."""
    page_size_padded: int | None = None
    mamba_type: str = "mamba2"
    mamba_cache_mode: str = "none"
    """"none" (one running state), "align" (states also at block boundaries) or "all"."""
    num_speculative_blocks: int = 0
    conv_state_layout: str = "SD"
    """"SD" (state rows by time) or "DS" (rows by channel, so a channel range is one run)."""
    segments: tuple[tuple[Segment, ...], ...] = ()
    """Of each state, what lies along its sharded axis; empty where the layer does not say."""
    sharded_axes: tuple[int, ...] = ()
    """Axis of each state that ranks share out; empty for axis 0 of each."""
    dtype_names: tuple[str, ...] = field(init=False, repr=False)

    kind = KVCacheSpecKind.MAMBA

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        object.__setattr__(self, "dtypes", tuple(self.dtypes))
        object.__setattr__(self, "dtype_names", tuple(dtype_name(d) for d in self.dtypes))
        if not self.shapes or len(self.shapes) != len(self.dtypes):
            raise ConfigError(
                f"{self.where}{len(self.shapes)} state shapes and {len(self.dtypes)} dtypes"
            )
        for i, shape in enumerate(self.shapes):
            sizes = {f"size {axis} of state {i}": size for axis, size in enumerate(shape)}
            check_counts(self.where, **sizes)
        check_counts(self.where, page_size_padded=self.page_size_padded)
        check_counts(self.where, 0, num_speculative_blocks=self.num_speculative_blocks)
        if self.conv_state_layout not in ("SD", "DS"):
            raise ConfigError(
                f"{self.where}conv_state_layout must be SD or DS, not {self.conv_state_layout!r}"
            )
        self._check_segments()
        if self.mamba_cache_mode not in ("none", "align", "all"):
            raise ConfigError(
                f"mamba_cache_mode must be none, align or all, not {self.mamba_cache_mode!r}",
                parameter="mamba_cache_mode",
            )
        needed = self.unpadded_page_size_bytes
        page = self.page_size_bytes
        if page < needed:
            raise ConfigError(
                f"{self.where}page of {page} bytes is smaller than its states' {needed} bytes"
            )
        for i, state in enumerate(self.state_table):
            item = dtype_itemsize(state.dtype_name)
            what = f"{self.where}state {i} {state.shape} of {self.mamba_type}"
            if state.offset % item:
                raise ConfigError(
                    f"{what} starts at byte {state.offset}, which {item}-byte {state.dtype_name} "
                    "does not divide: store the states before it in a dtype or order that keeps "
                    f"the offset a multiple of {item}",
                    parameter="mamba_cache_dtype",
                )
            if page % item:
                raise ConfigError(
                    f"{what}: a page of {page} bytes is not a multiple of its {item}-byte "
                    f"{state.dtype_name}; pad the page to {round_up(page, item)}"
                )

    def _check_segments(self) -> None:
        for given in (self.segments, self.sharded_axes):
            if given and len(given) != len(self.shapes):
                raise ConfigError(
                    f"{self.where}{len(given)} segments or axes for {len(self.shapes)} states"
                )
        for axis, shape in zip(self.sharded_axes, self.shapes, strict=False):
            if not 0 <= axis < len(shape):
                raise ConfigError(
                    f"{self.where}state {shape} of {self.mamba_type} has no axis {axis} to share"
                )
        for i, (parts, shape) in enumerate(zip(self.segments, self.shapes, strict=False)):
            axis = self.sharded_axes[i] if self.sharded_axes else 0
            rows = sum(part.rows_per_rank for part in parts)
            if parts and rows != shape[axis]:
                raise ConfigError(
                    f"{self.where}state {i} {shape} of {self.mamba_type} has segments of {rows} "
                    f"rows along axis {axis}"
                )

    @property
    def state_table(self) -> tuple[StateSlice, ...]:
        """Where each state lies in the page."""
        table, offset = [], 0
        for i, (shape, name) in enumerate(zip(self.shapes, self.dtype_names, strict=True)):
            size = math.prod(shape) * ITEMSIZE[name]
            table.append(
                StateSlice(
                    shape=shape,
                    dtype_name=name,
                    offset=offset,
                    size_bytes=size,
                    sharded_axis=self.sharded_axes[i] if self.sharded_axes else 0,
                    segments=self.segments[i] if self.segments else (),
                )
            )
            offset += size
        return tuple(table)

    @property
    def state_layout(self) -> str | None:
        return self.conv_state_layout

    @property
    def num_heads(self) -> int:
        return 1

    @property
    def tokens_per_state(self) -> int:
        return -1

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return 1

    @property
    def state_content_size_bytes(self) -> int:
        return self.page_size_bytes

    @property
    def storage_block_size(self) -> int:
        return self.block_size

    @property
    def unpadded_page_size_bytes(self) -> int:
        return sum(
            math.prod(shape) * ITEMSIZE[name]
            for shape, name in zip(self.shapes, self.dtype_names, strict=True)
        )

    @property
    def page_size_bytes(self) -> int:
        return self.page_size_padded or self.unpadded_page_size_bytes

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.STATE_PAGE

    @property
    def view_alignment(self) -> int:
        return math.lcm(*(ITEMSIZE[name] for name in self.dtype_names))

    @property
    def head_axis_is_sliceable(self) -> bool:
        return False

    @property
    def needs_zeroing(self) -> bool:
        return True

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    @property
    def prefix_cacheable(self) -> bool:
        return self.mamba_cache_mode != "none"

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (
            self.kind.value,
            self.block_size,
            self.mamba_cache_mode,
            self.num_speculative_blocks,
        )

    def state_column(self, num_tokens: int) -> int:
        """Position in a request's row of the block that holds the state after ``num_tokens``.

        Scheduler and workers both ask here. Speculative states follow in the next positions.
        """
        if self.mamba_cache_mode == "none":
            return 0
        return max(0, cdiv(num_tokens, self.block_size) - 1)

    def written_columns(self, num_computed_tokens: int, num_tokens: int) -> range:
        """Positions that a step writes which takes a request from one count to the other."""
        last = self.state_column(num_tokens)
        first = last
        if self.mamba_cache_mode == "all":
            first = num_computed_tokens // self.block_size
        return range(first, last + 1 + self.num_speculative_blocks)

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - 1) if self.mamba_cache_mode == "align" else 0

    def blocks_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        running = 1
        if self.mamba_cache_mode != "none":
            running = super().blocks_at(num_tokens, vllm_config)
        return running + self.num_speculative_blocks

    def payload_bytes_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        return self.blocks_at(num_tokens, vllm_config) * self.unpadded_page_size_bytes

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """1, or 2 at boundaries ("align"), or one per block ("all"); + speculative blocks, which at
        a boundary are there twice: behind the state that is read and behind the one written.
        """
        if self.mamba_cache_mode == "all":
            tokens = vllm_config.model_config.max_model_len
            return cdiv(tokens, self.block_size) + self.num_speculative_blocks
        running = 2 if self.mamba_cache_mode == "align" else 1
        return running * (1 + self.num_speculative_blocks)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        if self.mamba_cache_mode == "none":
            return 1 + self.num_speculative_blocks
        return cdiv(max_len, self.block_size) + self.num_speculative_blocks


@dataclass(frozen=True, kw_only=True)
class UniformTypeKVCacheSpecs(KVCacheSpec):
    """Layers of one kind, and so of one block table, whose pages differ: page = their sum."""

    kv_cache_specs: dict[str, KVCacheSpec]

    kind = KVCacheSpecKind.UNIFORM_TYPE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_uniform_type(self.kv_cache_specs):
            keys = sorted({str(spec.group_key) for spec in self.kv_cache_specs.values()})
            kinds = ", ".join(keys) or "no kind at all"
            raise ConfigError(f"layers of {kinds} cannot share a block table")
        if self.block_size != self.manager_spec.block_size:
            raise ConfigError(
                f"a group of blocks of {self.block_size} tokens cannot hold layers with blocks of "
                f"{self.manager_spec.block_size}"
            )

    @classmethod
    def is_uniform_type(cls, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        return len({spec.group_key for spec in kv_cache_specs.values()}) == 1

    @classmethod
    def from_specs(cls, kv_cache_specs: dict[str, KVCacheSpec]) -> UniformTypeKVCacheSpecs | None:
        """The group of these layers, or None where they cannot share a block table."""
        if not cls.is_uniform_type(kv_cache_specs):
            return None
        first = next(iter(kv_cache_specs.values()))
        return cls(block_size=first.block_size, kv_cache_specs=dict(kv_cache_specs))

    @property
    def unpadded_page_size_bytes(self) -> int:
        return sum(spec.unpadded_page_size_bytes for spec in self.kv_cache_specs.values())

    @property
    def page_size_bytes(self) -> int:
        return sum(spec.page_size_bytes for spec in self.kv_cache_specs.values())

    def get_page_sizes(self) -> set[int]:
        return {spec.page_size_bytes for spec in self.kv_cache_specs.values()}

    def get_num_layer_tuples(self) -> int:
        """Layers that have the commonest page size."""
        pages = [spec.page_size_bytes for spec in self.kv_cache_specs.values()]
        return max(pages.count(page) for page in set(pages))

    @property
    def manager_spec(self) -> KVCacheSpec:
        return next(iter(self.kv_cache_specs.values()))

    @property
    def group_key(self) -> tuple[Any, ...]:
        return self.manager_spec.group_key

    @property
    def needs_zeroing(self) -> bool:
        return any(spec.needs_zeroing for spec in self.kv_cache_specs.values())

    @property
    def uses_slot_mapping(self) -> bool:
        return self.manager_spec.uses_slot_mapping

    @property
    def prefix_cacheable(self) -> bool:
        return self.manager_spec.prefix_cacheable

    @property
    def tokens_per_state(self) -> int | Fraction:
        return self.manager_spec.tokens_per_state

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.manager_spec.num_skipped_tokens(num_computed_tokens)

    def blocks_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        return self.manager_spec.blocks_at(num_tokens, vllm_config)

    def payload_bytes_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        specs = self.kv_cache_specs.values()
        return sum(spec.payload_bytes_at(num_tokens, vllm_config) for spec in specs)

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        return self.manager_spec.max_resident_blocks(vllm_config)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.manager_spec.max_num_blocks_per_req(vllm_config, max_len)

    def copy_with_new_block_size(self, block_size: int) -> KVCacheSpec:
        return UniformTypeKVCacheSpecs(
            block_size=block_size,
            kv_cache_specs={
                name: spec.copy_with_new_block_size(block_size)
                for name, spec in self.kv_cache_specs.items()
            },
        )
