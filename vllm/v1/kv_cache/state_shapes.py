"""Shapes of the states that recurrent layers keep, per tensor-parallel rank, from a model's sizes.

Layers that declare a cache and plans that are made without building a model call the same
functions. Pure: integers in, ``StateShapes`` out; no model, no torch.

A convolution's state is given in ``SD`` order, ``(steps, channels)``; ``shapes.in_order("DS")``
turns it to ``(channels, steps)``, where a range of channels is one run of bytes. Steps are
``kernel - 1`` and one more for every speculative token.

=================  ==================================================  =======================
``mamba_type``     convolution state, channels per rank                recurrent state
=================  ==================================================  =======================
linear_attention   -                                                   (heads, D, D)
mamba1             I                                                   (I, state)
mamba2             x: I, B: groups * state, C: groups * state          (heads, head dim, state)
short_conv         I                                                   -
gdn_attention      Q: hk * nk, K: hk * nk, V: hv * nv                  (nv, hv, hk)
kda                Q: K: hk * nk each, V: hv * nv                      (heads, hv, hk)
=================  ==================================================  =======================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import Segment, check_counts, dtype_name

__all__ = ["MambaStateShapeCalculator", "StateShapes", "state_dtypes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShapes:
    """What one layer keeps per request, in the order in which the states lie in a page."""

    mamba_type: str
    shapes: tuple[tuple[int, ...], ...]
    is_conv: tuple[bool, ...]
    """Which of them is a convolution's."""
    segments: tuple[tuple[Segment, ...], ...]
    """Of each state, along its sharded axis: the channels, or axis 0 of a recurrent state."""
    conv_order: str = "SD"

    def in_order(self, conv_order: str | None) -> StateShapes:
        """The same with convolution states as ``SD`` (steps, channels) or ``DS``; None is SD.

        Raises:
            ConfigError: neither of the two.
        """
        order = conv_order or "SD"
        if order not in ("SD", "DS"):
            raise ConfigError(
                f"VLLM_SSM_CONV_STATE_LAYOUT must be SD or DS, not {order!r}",
                parameter="VLLM_SSM_CONV_STATE_LAYOUT",
                value=order,
            )
        if order == self.conv_order:
            return self
        shapes = tuple(
            shape[::-1] if conv else shape
            for shape, conv in zip(self.shapes, self.is_conv, strict=True)
        )
        return replace(self, shapes=shapes, conv_order=order)

    @property
    def sharded_axes(self) -> tuple[int, ...]:
        """Axis of each state that ranks share out."""
        last = 1 if self.conv_order == "SD" else 0
        return tuple(last if conv else 0 for conv in self.is_conv)


def _share(what: str, total: int, tp_size: int) -> int:
    if total <= 0 or total % tp_size:
        raise ConfigError(
            f"--tensor-parallel-size {tp_size} does not divide the {total} {what} of a state layer",
            parameter="tensor_parallel_size",
            value=tp_size,
        )
    return total // tp_size


def _segment(name: str, what: str, units: int, rows: int, tp_size: int) -> Segment:
    return Segment(name=name, units=units, rows=rows, units_per_rank=_share(what, units, tp_size))


def _group_segment(name: str, groups: int, rows: int, tp_size: int) -> Segment:
    """Groups are shared out, or copied to one a rank where the ranks don't divide them."""
    check_counts("", groups=groups, state_size=rows)
    if groups % tp_size == 0:
        return Segment(name=name, units=groups, rows=rows, units_per_rank=groups // tp_size)
    if tp_size % groups:
        raise ConfigError(
            f"--tensor-parallel-size {tp_size} neither divides the {groups} groups of a state "
            "layer nor is a multiple of them",
            parameter="tensor_parallel_size",
            value=tp_size,
        )
    return Segment(name=name, units=groups, rows=rows, units_per_rank=1)


def _shapes(
    mamba_type: str,
    conv: tuple[int, tuple[Segment, ...]] | None,
    recurrent: tuple[tuple[int, ...], Segment] | None,
) -> StateShapes:
    shapes: list[tuple[int, ...]] = []
    segments: list[tuple[Segment, ...]] = []
    if conv is not None:
        steps, parts = conv
        shapes.append((steps, sum(part.rows_per_rank for part in parts)))
        segments.append(parts)
    if recurrent is not None:
        inner, heads = recurrent
        shapes.append((heads.rows_per_rank, *inner))
        segments.append((heads,))
    return StateShapes(
        mamba_type=mamba_type,
        shapes=tuple(shapes),
        is_conv=(True, False)[: len(shapes)] if conv is not None else (False,),
        segments=tuple(segments),
    )


class MambaStateShapeCalculator:
    """One function for each ``mamba_type``. All sizes are the whole model's.

    Raises (all of them):
        ConfigError: ``tp_size`` does not divide what ranks share out.
    """

    @staticmethod
    def linear_attention(*, tp_size: int, num_heads: int, head_dim: int) -> StateShapes:
        heads = _segment("state", "heads", num_heads, 1, tp_size)
        return _shapes("linear_attention", None, ((head_dim, head_dim), heads))

    @staticmethod
    def mamba1(
        *, tp_size: int, intermediate_size: int, state_size: int, conv_kernel: int
    ) -> StateShapes:
        x = _segment("x", "channels", intermediate_size, 1, tp_size)
        state = replace(x, name="state")
        return _shapes("mamba1", (conv_kernel - 1, (x,)), ((state_size,), state))

    @staticmethod
    def mamba2(
        *,
        tp_size: int,
        intermediate_size: int,
        n_groups: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        conv_kernel: int,
        num_spec: int = 0,
    ) -> StateShapes:
        heads = _segment("state", "heads", num_heads, 1, tp_size)
        parts = (
            _segment("x", "heads", num_heads, intermediate_size // num_heads, tp_size),
            _group_segment("B", n_groups, state_size, tp_size),
            _group_segment("C", n_groups, state_size, tp_size),
        )
        steps = conv_kernel - 1 + num_spec
        return _shapes("mamba2", (steps, parts), ((head_dim, state_size), heads))

    @staticmethod
    def short_conv(
        *, tp_size: int, intermediate_size: int, conv_kernel: int, num_spec: int = 0
    ) -> StateShapes:
        x = _segment("x", "channels", intermediate_size, 1, tp_size)
        return _shapes("short_conv", (conv_kernel - 1 + num_spec, (x,)), None)

    @staticmethod
    def gdn_attention(
        *,
        tp_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        conv_kernel: int,
        num_spec: int = 0,
        mamba_type: str = "gdn_attention",
    ) -> StateShapes:
        parts = (
            _segment("Q", "key heads", num_k_heads, head_k_dim, tp_size),
            _segment("K", "key heads", num_k_heads, head_k_dim, tp_size),
            _segment("V", "value heads", num_v_heads, head_v_dim, tp_size),
        )
        heads = _segment("state", "value heads", num_v_heads, 1, tp_size)
        steps = conv_kernel - 1 + num_spec
        return _shapes(mamba_type, (steps, parts), ((head_v_dim, head_k_dim), heads))

    @staticmethod
    def kda(
        *,
        tp_size: int,
        num_heads: int,
        head_dim: int,
        num_k_heads: int,
        head_k_dim: int,
        conv_kernel: int,
        num_spec: int = 0,
    ) -> StateShapes:
        return MambaStateShapeCalculator.gdn_attention(
            tp_size=tp_size,
            num_k_heads=num_k_heads,
            num_v_heads=num_heads,
            head_k_dim=head_k_dim,
            head_v_dim=head_dim,
            conv_kernel=conv_kernel,
            num_spec=num_spec,
            mamba_type="kda",
        )


def state_dtypes(
    shapes: StateShapes,
    model_dtype: Any,
    mamba_cache_dtype: str = "auto",
    mamba_ssm_cache_dtype: str = "auto",
) -> tuple[str, ...]:
    """Names of the dtypes of a layer's states.

    A convolution's is --mamba-cache-dtype, by default the model's; a recurrent state's is
    --mamba-ssm-cache-dtype, by default the convolution's, and float32 for KDA.
    """
    conv = dtype_name(model_dtype if mamba_cache_dtype == "auto" else mamba_cache_dtype)
    if mamba_ssm_cache_dtype != "auto":
        recurrent = dtype_name(mamba_ssm_cache_dtype)
    else:
        recurrent = "float32" if shapes.mamba_type == "kda" else conv
    return tuple(conv if is_conv else recurrent for is_conv in shapes.is_conv)
