"""Linear layers, whole or cut over the tensor-parallel ranks; fused where inputs are shared.

Each holds a ``weight`` (out, in) while it is loaded; ``process_weights_after_loading`` packs it
for the kernels once and lets go of the original, so memory holds one copy. A layer must not know
which model it is part of.

``forward`` returns ``(output, None)`` as vLLM's layers do, or only the output with
``return_bias=False``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    WeightShapeError,
    copy_weight,
    make_parameter,
    take_shard,
)

__all__ = [
    "ColumnParallelLinear",
    "LinearBase",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
    "divide",
]


def divide(whole: int, parts: int, what: str) -> int:
    """``whole / parts``.

    Raises:
        ConfigError: it leaves a rest.
    """
    if whole % parts:
        raise ConfigError(
            f"--tensor-parallel-size {parts} does not divide {what} ({whole}) of this model",
            parameter="tensor_parallel_size",
            value=parts,
        )
    return whole // parts


class LinearBase(nn.Module):
    """The weight, its packing and the product; subclasses say what this rank holds of it."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        local_input_size: int,
        local_output_size: int,
        *,
        bias: bool,
        params_dtype: torch.dtype | None,
        quant_config: Any | None,
        prefix: str,
        return_bias: bool,
        shard_ids: tuple[ShardId, ...] = (None,),
    ) -> None:
        super().__init__()
        if quant_config is not None:
            raise UnsupportedError(f"{prefix}: quantised weights are not supported yet")
        self.input_size = input_size
        self.output_size = output_size
        self.prefix = prefix
        self.return_bias = return_bias
        attrs: dict[str, Any] = {"dtype": params_dtype, "shard_ids": shard_ids}
        self.weight = make_parameter(
            local_output_size, local_input_size, weight_loader=self.weight_loader, **attrs
        )
        if bias:
            self.bias = make_parameter(local_output_size, weight_loader=self.weight_loader, **attrs)
        else:
            self.register_parameter("bias", None)
        # Plain attributes: nn.Module looks a parameter up through two dicts on each access.
        self.packed_weight: ops.PackedWeight | torch.Tensor = self.weight.data
        self.bias_data: torch.Tensor | None = None if self.bias is None else self.bias.data

    @abstractmethod
    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Copy this rank's part of a checkpoint's tensor into ``param``."""

    def process_weights_after_loading(self) -> None:
        """Pack the weight; from here on there is no ``weight`` parameter."""
        if "weight" in self._parameters:
            self.packed_weight = ops.pack_weight(self.weight.data)
            del self.weight

    def forward(self, input_: torch.Tensor) -> Any:
        """(..., in) -> (..., out)."""
        output = ops.linear(input_, self.packed_weight, self.bias_data)
        return (output, None) if self.return_bias else output

    def extra_repr(self) -> str:
        return f"in={self.input_size}, out={self.output_size}, bias={self.bias is not None}"


class ReplicatedLinear(LinearBase):
    """Every rank holds the whole weight."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            input_size,
            output_size,
            bias=bias,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
        )

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        copy_weight(param.data, loaded_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One projection inside a weight whose output rows are cut over the ranks."""

    id: ShardId
    """What loaders call it; None where there is only one."""
    full_size: int
    """Rows in the checkpoint."""
    start: int
    """First row in this rank's parameter."""
    size: int
    """Rows of this rank."""
    index: int
    """Which ``size`` rows of the checkpoint's; ranks share an index where heads are replicated."""


class ColumnParallelLinear(LinearBase):
    """Each rank holds some of the output rows, of one projection or of several side by side.

    A checkpoint that holds several projections fused already is loaded with ``shard_id=None``.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        shards: tuple[OutputShard, ...] = (),
    ) -> None:
        tp = get_tp_group()
        if not shards:
            size = divide(output_size, tp.world_size, f"the outputs of {prefix or 'a layer'}")
            shards = (
                OutputShard(
                    id=None, full_size=output_size, start=0, size=size, index=tp.rank_in_group
                ),
            )
        super().__init__(
            input_size,
            output_size,
            input_size,
            sum(shard.size for shard in shards),
            bias=bias,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
            shard_ids=tuple(shard.id for shard in shards),
        )
        self.shards = shards
        self.gather_output = gather_output and tp.world_size > 1
        if self.gather_output and len(shards) > 1:
            raise ValueError("gather_output would interleave the ranks' parts of a fused layer")

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Copy this rank's rows of one projection, or of all for a fused tensor."""
        if shard_id is None and len(self.shards) > 1:
            sizes = [shard.full_size for shard in self.shards]
            expected = (sum(sizes), *param.shape[1:])
            if tuple(loaded_weight.shape) != expected:
                raise WeightShapeError(loaded_weight.shape, expected)
            for shard, part in zip(self.shards, loaded_weight.split(sizes), strict=True):
                self._load_shard(param, part, shard)
            return
        (shard,) = (shard for shard in self.shards if shard.id == shard_id)
        self._load_shard(param, loaded_weight, shard)

    def _load_shard(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard: OutputShard
    ) -> None:
        full = (shard.full_size, *param.shape[1:])
        part = take_shard(loaded_weight, 0, shard.index, shard.size, full)
        copy_weight(param.data.narrow(0, shard.start, shard.size), part)

    def forward(self, input_: torch.Tensor) -> Any:
        """(..., in) -> (..., out of this rank), or all of it with ``gather_output``."""
        output = ops.linear(input_, self.packed_weight, self.bias_data)
        if self.gather_output:
            output = get_tp_group().all_gather(output)
        return (output, None) if self.return_bias else output


def _side_by_side(parts: list[tuple[ShardId, int, int, int]]) -> tuple[OutputShard, ...]:
    """Shards one after another, from (id, full size, size, index)."""
    shards, start = [], 0
    for shard_id, full_size, size, index in parts:
        shards.append(
            OutputShard(id=shard_id, full_size=full_size, start=start, size=size, index=index)
        )
        start += size
    return tuple(shards)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several projections of one input as one product; shard ids are 0, 1, ..."""

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        gather_output: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
    ) -> None:
        tp = get_tp_group()
        what = f"the outputs of {prefix or 'a layer'}"
        super().__init__(
            input_size,
            sum(output_sizes),
            bias,
            gather_output,
            params_dtype,
            quant_config,
            prefix,
            return_bias=return_bias,
            shards=_side_by_side(
                [
                    (i, size, divide(size, tp.world_size, what), tp.rank_in_group)
                    for i, size in enumerate(output_sizes)
                ]
            ),
        )
        self.output_sizes = output_sizes

    def forward_silu_and_mul(self, input_: torch.Tensor) -> torch.Tensor:
        """``silu(first) * second`` of two equal projections, fused: (..., in) -> (..., out / 2)."""
        if self.bias_data is None:
            return ops.gate_up_silu(input_, self.packed_weight)
        return ops.silu_and_mul(ops.linear(input_, self.packed_weight, self.bias_data))


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one product, cut by heads; shard ids "q", "k", "v".

    With more ranks than KV heads, each KV head is held by several ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
    ) -> None:
        tp = get_tp_group()
        total_num_kv_heads = total_num_kv_heads or total_num_heads
        self_heads = divide(total_num_heads, tp.world_size, "the number of attention heads")
        if tp.world_size > total_num_kv_heads:
            replicas = divide_replicas(total_num_kv_heads, tp.world_size)
            kv_heads = 1
        else:
            replicas = 1
            kv_heads = divide(total_num_kv_heads, tp.world_size, "the number of KV heads")
        kv = (
            total_num_kv_heads * head_size,
            kv_heads * head_size,
            tp.rank_in_group // replicas,
        )
        query = (total_num_heads * head_size, self_heads * head_size, tp.rank_in_group)
        super().__init__(
            hidden_size,
            (total_num_heads + 2 * total_num_kv_heads) * head_size,
            bias,
            False,
            params_dtype,
            quant_config,
            prefix,
            return_bias=return_bias,
            shards=_side_by_side([("q", *query), ("k", *kv), ("v", *kv)]),
        )
        self.num_heads = self_heads
        self.num_kv_heads = kv_heads
        self.head_size = head_size


def divide_replicas(num_kv_heads: int, tp_size: int) -> int:
    """Ranks that share one KV head where there are more ranks than heads.

    Raises:
        ConfigError: the heads can't be shared evenly.
    """
    if tp_size % num_kv_heads:
        raise ConfigError(
            f"--tensor-parallel-size {tp_size} is not a multiple of the number of KV heads "
            f"({num_kv_heads}) of this model",
            parameter="tensor_parallel_size",
            value=tp_size,
        )
    return tp_size // num_kv_heads


class RowParallelLinear(LinearBase):
    """Each rank holds some of the input columns; the ranks' products are summed."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: Any | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
    ) -> None:
        tp = get_tp_group()
        self_size = divide(input_size, tp.world_size, f"the inputs of {prefix or 'a layer'}")
        super().__init__(
            input_size,
            output_size,
            self_size,
            output_size,
            bias=bias,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
        )
        self.tp_rank, self.tp_size = tp.rank_in_group, tp.world_size
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results and self.tp_size > 1
        if bias and self.tp_size > 1 and not reduce_results:
            raise ValueError("a row-parallel bias needs reduce_results: it is added once")

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        if param.dim() == 1:
            copy_weight(param.data, loaded_weight)
            return
        full = (self.output_size, self.input_size)
        part = take_shard(loaded_weight, 1, self.tp_rank, param.shape[1], full)
        copy_weight(param.data, part)

    def forward(self, input_: torch.Tensor) -> Any:
        """(..., in of this rank) -> (..., out); the whole input if not ``input_is_parallel``."""
        if not self.input_is_parallel and self.tp_size > 1:
            size = self.input_size // self.tp_size
            input_ = input_.narrow(-1, self.tp_rank * size, size)
        bias = self.bias_data if self.tp_rank == 0 else None
        output = ops.linear(input_, self.packed_weight, bias)
        if self.reduce_results:
            output = get_tp_group().all_reduce(output)
        return (output, None) if self.return_bias else output
