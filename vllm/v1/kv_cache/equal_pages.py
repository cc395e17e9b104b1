"""What vLLM's rule would hold: all pages made equal, layers cut into groups of one size.

The yardstick that plans are printed beside; nothing is allocated by it. The rule, in order:

1. Beside states, attention blocks grow to ``a * cdiv(state page, a * bytes of a token)`` tokens,
   ``a`` the kernels' block alignment (16; 128 for latents), and state pages are padded to it.
2. All pages become the largest: a state's by padding; another's by enlarging its block where the
   ratio is whole, else by padding. A latent page that neither divides can't be made equal: then
   groups of unequal pages overlay each other, one group a kind.
3. With equal pages, layers of one kind are dealt to groups of ``size`` layers: that of the smallest
   kind, or of the largest where it is under 1.5 times that. A group that is not full wastes its
   slots.
4. A block of any group takes ``size`` pages. One kind alone is one group.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache.attention_specs import AttentionSpec
from vllm.v1.kv_cache.content import cdiv
from vllm.v1.kv_cache.grouping import kinds_of
from vllm.v1.kv_cache.latent_specs import MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_specs import MambaSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["EqualPagesPlan", "plan_with_equal_pages"]

Specs = Mapping[str, KVCacheSpec]
_KERNEL_ALIGNMENT, _LATENT_ALIGNMENT = 16, 128
_NEARLY_AS_MANY = 1.5
_LATENT = (MLAAttentionSpec, SlidingWindowMLASpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualPagesPlan:
    """Groups as the rule makes them."""

    groups: tuple[tuple[str, ...], ...]
    specs: dict[str, KVCacheSpec]
    bytes_per_block: int

    def held_bytes(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        """Bytes that one request of ``num_tokens`` tokens holds, empty slots included."""
        firsts = [self.specs[names[0]] for names in self.groups]
        blocks = sum(spec.blocks_at(num_tokens, vllm_config) for spec in firsts)
        return blocks * self.bytes_per_block


def plan_with_equal_pages(specs: Specs, vllm_config: VllmConfig) -> EqualPagesPlan:
    """Apply the rule; ``specs`` are as layers declare them."""
    kinds = list(kinds_of(specs).values())
    if len(kinds) == 1:
        total = sum(spec.page_size_bytes for spec in specs.values())
        return EqualPagesPlan(groups=(tuple(kinds[0]),), specs=dict(specs), bytes_per_block=total)
    may_change = not vllm_config.cache_config.user_specified_block_size
    aligned = _align_states(specs) if may_change else dict(specs)
    equal = _equal_pages(aligned)
    if equal is None:
        block = max(sum(specs[name].page_size_bytes for name in names) for names in kinds)
        return EqualPagesPlan(
            groups=tuple(map(tuple, kinds)), specs=dict(specs), bytes_per_block=block
        )
    kinds = list(kinds_of(equal).values())
    least, most = min(map(len, kinds)), max(map(len, kinds))
    size = most if most < _NEARLY_AS_MANY * least else least
    groups = []
    for names in kinds:
        count = cdiv(len(names), size)
        groups += [tuple(names[i::count]) for i in range(count)]
    page = next(iter(equal.values())).page_size_bytes
    return EqualPagesPlan(groups=tuple(groups), specs=equal, bytes_per_block=size * page)


def _align_states(specs: Specs) -> dict[str, KVCacheSpec]:
    """Step 1."""
    states = {name: spec for name, spec in specs.items() if isinstance(spec, MambaSpec)}
    paged = {name: spec for name, spec in specs.items() if name not in states}
    if not states or not paged:
        return dict(specs)
    alignment = (
        _LATENT_ALIGNMENT
        if any(isinstance(spec, _LATENT) for spec in paged.values())
        else _KERNEL_ALIGNMENT
    )
    needed = max(spec.unpadded_page_size_bytes for spec in states.values())
    token = max(cdiv(spec.page_size_bytes, spec.block_size) for spec in paged.values())
    block_size = alignment * cdiv(needed, alignment * token)
    grown = {
        name: spec.copy_with_new_block_size(max(block_size, spec.block_size))
        for name, spec in paged.items()
    }
    return {**specs, **grown}


def _equal_pages(specs: Specs) -> dict[str, KVCacheSpec] | None:
    """Step 2, or None where it fails."""
    largest = max(spec.page_size_bytes for spec in specs.values())
    equal: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        page = spec.page_size_bytes
        if page == largest:
            equal[name] = spec
        elif isinstance(spec, MambaSpec):
            equal[name] = replace(spec, page_size_padded=largest)
        elif largest % page == 0:
            equal[name] = spec.copy_with_new_block_size(spec.block_size * (largest // page))
        elif isinstance(spec, AttentionSpec) and not isinstance(spec, _LATENT):
            equal[name] = replace(spec, page_size_padded=largest)
        else:
            return None
    return equal
