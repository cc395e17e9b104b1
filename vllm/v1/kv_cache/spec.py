"""``KVCacheSpec``: what any layer declares that it keeps for each block.

Every cache is logically ``(B, H, N, C)``: blocks, head slots, states per block, content. A
spec answers ``num_heads`` (H), ``num_states`` (N) and ``state_content_size_bytes`` (C), and

    page = H * N * C bytes per block and layer, then rounded up to an alignment or padded.

Pure arithmetic: no torch, no backend, no model. Plug-ins may subclass specs, so they are frozen
but have no slots.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import (
    ContentFormat,
    KVCacheSpecKind,
    MultipleOf,
    StateSlice,
    cdiv,
    check_counts,
    dtype_itemsize,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one layer keeps per block of ``block_size`` tokens."""

    block_size: int
    """Tokens that one manager block stands for."""
    block_stride_alignment: int | MultipleOf = 1
    """Bytes that the distance between two blocks must be a multiple of; kept as a number."""
    dcp_sharded: bool = True
    """Ranks that share a context while decoding keep a share of its tokens each."""
    is_draft: bool = field(default=False, compare=False)
    """The layer belongs to a draft model."""
    layer_name: str = field(default="", compare=False, repr=False)
    """Only used in messages."""

    def __post_init__(self) -> None:
        check_counts(self.where, block_size=self.block_size)
        object.__setattr__(self, "block_stride_alignment", self.stride_alignment)
        check_counts(self.where, block_stride_alignment=self.block_stride_alignment)

    @property
    def stride_alignment(self) -> int:
        """``block_stride_alignment`` as a number."""
        alignment = self.block_stride_alignment
        return alignment.base if isinstance(alignment, MultipleOf) else alignment

    @property
    def where(self) -> str:
        """Start of a message about this layer."""
        return f"layer {self.layer_name}: " if self.layer_name else ""

    kind = KVCacheSpecKind.FULL

    @property
    def num_heads(self) -> int:
        """H: head slots of one block."""
        raise TypeError(f"{type(self).__name__} has no logical shape of its own")

    @property
    def tokens_per_state(self) -> int | Fraction:
        """Tokens that one state stands for; -1 where a state does not count tokens."""
        return 1

    @property
    def num_states(self) -> int:
        """N: states of one manager block."""
        return self.get_num_kernel_states(self.block_size)

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """States of a kernel block of ``kernel_block_size`` tokens."""
        if self.tokens_per_state == 1:
            return kernel_block_size
        states = Fraction(kernel_block_size) / Fraction(self.tokens_per_state)
        if states.denominator != 1 or states < 1:
            raise ConfigError(
                f"{self.where}a block of {kernel_block_size} tokens does not hold a whole number "
                f"of states of {self.tokens_per_state} tokens: choose a --block-size that is a "
                f"multiple of {Fraction(self.tokens_per_state).numerator}",
                parameter="block_size",
                value=kernel_block_size,
            )
        return int(states)

    @property
    def state_content_size_bytes(self) -> int:
        """C in bytes: content of one (head slot, state)."""
        raise TypeError(f"{type(self).__name__} has no logical shape of its own")

    @property
    def storage_block_size(self) -> int:
        """N by its older name."""
        return self.num_states

    @property
    def unpadded_page_size_bytes(self) -> int:
        """H * N * C: bytes that carry content; the span of a page."""
        return self.num_heads * self.num_states * self.state_content_size_bytes

    @property
    def page_size_bytes(self) -> int:
        """Room of one block and layer, in bytes: the span, aligned and padded."""
        return self.unpadded_page_size_bytes

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.KV_PER_TOKEN

    @property
    def storage_dtype(self) -> str:
        """Name of the dtype that the layer's view has."""
        return "int8"

    @property
    def view_alignment(self) -> int:
        """Bytes that offset and strides of the page must be a multiple of, for every view."""
        return dtype_itemsize(self.storage_dtype)

    @property
    def head_axis_is_sliceable(self) -> bool:
        """A range of head slots is a set of whole byte ranges with a meaning of its own."""
        return self.num_heads > 1

    @property
    def head_sides(self) -> int:
        """2 where K heads and V heads are apart on the head axis, else 1."""
        return 2 if self.content_format is ContentFormat.KV_HEAD_GROUPS else 1

    @property
    def num_heads_of_side(self) -> int:
        """Head slots that hold one side's heads: all of them unless K and V are apart."""
        return self.num_heads // self.head_sides

    @property
    def content_parts(self) -> tuple[tuple[str, int], ...]:
        """Names and bytes of what one (head slot, state) consists of, in order."""
        return (("content", self.state_content_size_bytes),)

    @property
    def state_table(self) -> tuple[StateSlice, ...]:
        """Where states lie in the page; empty unless the page is a row of states."""
        return ()

    @property
    def state_layout(self) -> str | None:
        """Order inside a convolution state, "SD" or "DS"; None where there is none."""
        return None

    @property
    def needs_block_contiguous(self) -> bool:
        """The page only has its meaning in the order H, N, C, in one run."""
        return False

    @property
    def needs_zeroing(self) -> bool:
        """A block taken from the pool is read before it is written."""
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return True

    @property
    def has_layer_views(self) -> bool:
        """The layer gets a tensor of its own: it keeps something."""
        return self.page_size_bytes > 0

    @property
    def block_table_token_alignment(self) -> int:
        """Tokens that a request's row of the block table grows by."""
        return self.block_size

    @property
    def prefix_cacheable(self) -> bool:
        """A full block can be found again by the hash of its tokens."""
        return True

    @property
    def group_key(self) -> tuple[Any, ...]:
        """Layers with equal keys need the same blocks at the same time: one block table."""
        return (self.kind.value, self.block_size)

    @property
    def manager_spec(self) -> KVCacheSpec:
        """The spec by which the scheduler chooses a manager; a member's for a uniform group."""
        return self

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Leading tokens that the next token, and all after it, do not read."""
        return 0

    def blocks_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        """Blocks that a request of ``num_tokens`` computed tokens holds between two steps."""
        first = self.num_skipped_tokens(num_tokens) // self.block_size
        return cdiv(num_tokens, self.block_size) - first

    def payload_bytes_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        """Bytes of those blocks that a layer still reads."""
        tokens = num_tokens - self.num_skipped_tokens(num_tokens)
        states = int(Fraction(tokens) / Fraction(self.tokens_per_state))
        return states * self.num_heads * self.state_content_size_bytes

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """Blocks that one request of the longest length holds at one time, at most."""
        longest = vllm_config.model_config.max_model_len
        if self.dcp_sharded:
            longest = cdiv(longest, vllm_config.parallel_config.decode_context_parallel_size)
        return cdiv(longest, self.block_size)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of one request's row of the block table."""
        return cdiv(max_len, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request of the longest length, for one layer."""
        return self.max_resident_blocks(vllm_config) * self.page_size_bytes

    def copy_with_new_block_size(self, block_size: int) -> KVCacheSpec:
        """The same layer with blocks of another size; a padding that no longer fits is dropped."""
        return replace(self, block_size=block_size)

    def with_layer_name(self, layer_name: str) -> KVCacheSpec:
        return replace(self, layer_name=layer_name)

    @classmethod
    def merge(cls, specs: Sequence[KVCacheSpec]) -> KVCacheSpec:
        """One spec for layers of one group.

        Raises:
            ConfigError: the specs differ.
        """
        first = specs[0]
        for spec in specs[1:]:
            if spec != first:
                raise ConfigError(f"layers of one cache group differ: {first} and {spec}")
        return copy.copy(first)

    def is_uniform_with_collection(self, specs: Mapping[str, KVCacheSpec]) -> bool:
        """All of ``specs`` can share one block table with this one."""
        return all(spec.group_key == self.group_key for spec in specs.values())
