"""What the kinds of state layers are made of besides products: shards, convolutions, gated norms.

Knows nothing of caches and of recurrences.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import nn

from vllm import _state_ops as ops
from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.linear import ColumnParallelLinear, OutputShard
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    WeightShapeError,
    copy_weight,
    make_parameter,
    take_shard,
)
from vllm.v1.kv_cache.content import Segment

__all__ = [
    "require_silu",
    "CausalConv1d",
    "GatedRMSNorm",
    "SegmentedLinear",
    "load_rows",
    "make_head_parameter",
    "row_shards",
]


def require_silu(activation: str, owner: str, names: Container[str] = ("silu",)) -> None:
    """Refuse what ``owner``, a kind of layer, cannot compute.

    Args:
        names: what configurations may call SiLU.

    Raises:
        UnsupportedError: another activation.
    """
    if activation not in names:
        raise UnsupportedError(
            f"config.json: the activation {activation!r} of {owner} is not supported; 'silu' is",
            parameter="model",
        )


def row_shards(segments: Iterable[Segment]) -> tuple[OutputShard, ...]:
    """This rank's rows of the parts that lie side by side along axis 0 of a checkpoint's tensor.

    Where ranks are more than a part's units (groups), several hold the same unit.
    """
    tp = get_tp_group()
    shards: list[OutputShard] = []
    start = 0
    for index, part in enumerate(segments):
        size = part.rows_per_rank
        sharers = max(1, tp.world_size * part.units_per_rank // part.units)
        shards.append(
            OutputShard(
                id=index,
                full_size=part.units * part.rows,
                start=start,
                size=size,
                index=tp.rank_in_group // sharers,
            )
        )
        start += size
    return tuple(shards)


def load_rows(param: torch.Tensor, loaded: torch.Tensor, shards: tuple[OutputShard, ...]) -> None:
    """Copy this rank's rows of each part into ``param``.

    Raises:
        WeightShapeError: the tensor has another shape than the whole parameter.
    """
    full = (sum(shard.full_size for shard in shards), *param.shape[1:])
    if tuple(loaded.shape) != full:
        raise WeightShapeError(loaded.shape, full)
    parts = loaded.split([shard.full_size for shard in shards])
    for shard, part in zip(shards, parts, strict=True):
        mine = take_shard(part, 0, shard.index, shard.size, part.shape)
        copy_weight(param.narrow(0, shard.start, shard.size), mine)


def make_head_parameter(part: Segment, *inner: int) -> nn.Parameter:
    """A float32 parameter (rows of this rank, *inner), whatever the model's dtype."""
    shards = row_shards([part])

    def load(param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        load_rows(param.data, loaded, shards)

    return make_parameter(part.rows_per_rank, *inner, dtype=torch.float32, weight_loader=load)


class SegmentedLinear(ColumnParallelLinear):
    """One product for several parts, each of which is cut over the ranks by its own units."""

    def __init__(
        self, input_size: int, segments: Iterable[Segment], *, bias: bool, prefix: str
    ) -> None:
        shards = row_shards(segments)
        super().__init__(
            input_size,
            sum(shard.full_size for shard in shards),
            bias,
            prefix=prefix,
            return_bias=False,
            shards=shards,
        )


class CausalConv1d(nn.Module):
    """A depthwise convolution over time that continues where the last chunk ended.

    Args:
        segments: what the channels are, in their order.
        kernel_size: taps, the token's own included.
        activation: "silu", or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        segments: Iterable[Segment],
        kernel_size: int,
        *,
        bias: bool,
        activation: str | None = "silu",
    ) -> None:
        super().__init__()
        self.shards = row_shards(segments)
        self.activation = activation
        channels = sum(shard.size for shard in self.shards)
        self.weight = make_parameter(channels, kernel_size, weight_loader=self.weight_loader)
        if bias:
            self.bias = make_parameter(channels, weight_loader=self.weight_loader)
        else:
            self.register_parameter("bias", None)
        self.taps = self.weight.data
        self.bias_data: torch.Tensor | None = None

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Take (channels, 1, taps), as checkpoints have it, or (channels, taps)."""
        load_rows(param.data, loaded.squeeze(1) if loaded.dim() == 3 else loaded, self.shards)

    def process_weights_after_loading(self) -> None:
        """The kernels read taps (K, channels) in float32."""
        if "weight" not in self._parameters:
            return
        self.taps = self.weight.data.float().t().contiguous()
        del self.weight
        if self.bias is not None:
            self.bias_data = self.bias.data.float()
            self.bias = None

    def forward(
        self, x: torch.Tensor, conv_state: torch.Tensor, segments: ops.StateSegments
    ) -> torch.Tensor:
        """(T, channels) -> the same; rows may be strided."""
        return ops.causal_conv1d(
            x, self.taps, self.bias_data, conv_state, segments, self.activation
        )


class GatedRMSNorm(nn.Module):
    """RMSNorm by groups of the gated output of a recurrence; ranks share a group's sum if need be.

    Args:
        part: the channels, by heads.
        num_groups: groups of the whole model's channels.
        norm_before_gate: gate what is normed; else norm what is gated.
    """

    def __init__(
        self, part: Segment, num_groups: int, eps: float, *, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        tp = get_tp_group()
        self.weight = make_head_parameter(part)
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.group_size = part.units * part.rows // num_groups
        self.num_groups = num_groups
        self.local_size = part.rows_per_rank
        self.first_row = tp.rank_in_group * self.local_size
        self.is_local = self.local_size % self.group_size == 0

    def process_weights_after_loading(self) -> None:
        self.weight_data = self.weight.data

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """(T, channels of this rank) and its gate -> the same."""
        if self.is_local:
            groups = self.local_size // self.group_size
            return ops.gated_rms_norm(
                x, gate, self.weight_data, self.eps, groups, self.norm_before_gate
            )
        return self._norm_over_ranks(x.float(), gate.float()).to(x.dtype)

    def _norm_over_ranks(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """A rank has a part of one or more groups: sums of squares are added up over the ranks."""
        gate = nn.functional.silu(gate)
        if not self.norm_before_gate:
            x = x * gate
        rows = torch.arange(self.first_row, self.first_row + self.local_size, device=x.device)
        group = rows // self.group_size
        sums = torch.zeros(x.shape[0], self.num_groups, device=x.device)
        sums = get_tp_group().all_reduce(sums.index_add_(1, group, x * x))
        x = x * torch.rsqrt(sums / self.group_size + self.eps)[:, group] * self.weight_data
        return x * gate if self.norm_before_gate else x
