"""The six physical orders of a KV cache, as values.

Owns the names of the orders and what follows from a name alone. Knows no sizes, no tensors, no
backends, and imports nothing of this package but the errors, so that every part may use it.

Axis letters: ``L`` layers, ``B`` blocks, ``H`` head slots, ``N`` states per block, ``C`` content.
Every cache is logically ``(L, B, H, N, C)``; a layout says which axis lies outside which.
"""

from __future__ import annotations

import enum

from vllm.errors import ConfigError

__all__ = ["LOGICAL_AXES", "KVCacheLayout"]

LOGICAL_AXES = "LBHNC"


class KVCacheLayout(enum.StrEnum):
    """Physical order of the axes, outermost first; the value is the name.

    ========  =============  ===============  =============  ================
    name      layer-compact  block-outermost  block-compact  block-contiguous
    ========  =============  ===============  =============  ================
    LBHNC     yes                             yes            yes
    LBNHC     yes                             yes
    LHBNC     yes
    BLHNC                    yes              yes            yes
    BLNHC                    yes              yes
    BHLNC                    yes
    ========  =============  ===============  =============  ================
    """

    LBHNC = "LBHNC"
    LBNHC = "LBNHC"
    LHBNC = "LHBNC"
    BLHNC = "BLHNC"
    BLNHC = "BLNHC"
    BHLNC = "BHLNC"

    @classmethod
    def from_str(cls, name: str | KVCacheLayout) -> KVCacheLayout:
        """The layout called ``name``; ``HND`` is LBHNC and ``NHD`` is LBNHC, in any case.

        Raises:
            ConfigError: no layout has that name.
        """
        if isinstance(name, cls):
            return name
        canonical = {"HND": "LBHNC", "NHD": "LBNHC"}.get(name.upper(), name.upper())
        try:
            return cls(canonical)
        except ValueError:
            raise ConfigError(
                f"unknown KV cache layout {name!r}: use one of "
                f"{', '.join(m.value for m in cls)}, HND (= LBHNC) or NHD (= LBNHC)",
                parameter="VLLM_KV_CACHE_LAYOUT",
                value=name,
            ) from None

    @property
    def stride_order(self) -> tuple[int, ...]:
        """Permutation p of five axes: physical axis i is logical (L, B, H, N, C) axis p[i]."""
        return tuple(LOGICAL_AXES.index(axis) for axis in self.value)

    @property
    def layer_view_order(self) -> tuple[int, ...]:
        """The same for one layer: a permutation of logical (B, H, N, C)."""
        return tuple("BHNC".index(axis) for axis in self.value if axis != "L")

    @property
    def is_layer_compact(self) -> bool:
        """L is outermost: a layer's blocks are one stretch of memory."""
        return self.value[0] == "L"

    @property
    def is_block_outermost(self) -> bool:
        """B is outermost: a block's pages of all layers are one stretch of memory."""
        return self.value[0] == "B"

    @property
    def is_block_compact(self) -> bool:
        """L and B are the two outer axes: one layer's page of one block is one run of bytes."""
        return set(self.value[:2]) == {"L", "B"}

    @property
    def is_block_contiguous(self) -> bool:
        """The page is in order H, N, C: one head's part of a page is one run of bytes."""
        return self.value[2:] == "HNC"

    @property
    def head_layout_name(self) -> str:
        """ "HND" or "NHD": the name that outside kernels give the order inside a block."""
        return "NHD" if self.value.index("N") < self.value.index("H") else "HND"
