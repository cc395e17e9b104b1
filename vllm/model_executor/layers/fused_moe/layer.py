"""The experts of a mixture: their weights, how a checkpoint fills them, and the product.

Tokens are sorted by expert, so that each expert's are one run of rows and one product. The weights
of gate and up projection are one ("w13"), as are those of all experts in most checkpoints; experts
without a gate have the up projection alone there. The inner dimension is cut over the
tensor-parallel ranks. A layer must not know which model it is
part of; which token goes to which expert is decided in ``routing``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm._moe_op import MoeKernel
from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.activation import (
    GatedActivation,
    SiluAndMul,
    get_activation,
    get_gated_activation,
)
from vllm.model_executor.layers.fused_moe.routing import Routing, select_experts
from vllm.model_executor.layers.linear import divide
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    WeightShapeError,
    copy_weight,
    make_parameter,
    take_shard,
)

__all__ = ["FusedMoE"]

_PAIRS_AT_ONCE = 16384
"""(token, expert) pairs in memory at a time: 2,048 tokens of 8 experts."""


class FusedMoE(nn.Module):
    """``sum over chosen experts of weight * down(act(gate(x)) * up(x))``; without a gate,
    ``down(act(up(x)))``.

    ======================  =======================  ==========================================
    parameter               shape                    shards
    ======================  =======================  ==========================================
    ``w13_weight``          (E, 2 * inner, hidden)   (expert, "gate"), (expert, "up")
    ``w2_weight``           (E, hidden, inner)       (expert, "down")
    ``w13_bias``            (E, 2 * inner)           as its weight
    ``w2_bias``             (E, hidden)              as its weight
    ======================  =======================  ==========================================

    Each also takes all experts' tensors at once. Without a gate, ``w13`` has ``inner`` rows.

    Args:
        intermediate_size: inner size of one expert, over all ranks.
        activation: a module, or a name of ``layers.activation.get_gated_activation``, or of
            ``get_activation`` for experts without a gate.
        is_gated: experts have a gate projection.
        correction_bias: see ``select_experts``; (E,), read when it is used.
        apply_router_weight_on_input: weights multiply what goes into an expert.
        reduce_results: sum over the ranks; else the caller does.
        transposed: a checkpoint's tensors of all experts are (E, in, out).
        interleaved: their gate and up rows alternate.

    Raises:
        ConfigError: --tensor-parallel-size does not divide the inner size.
    """

    w13_bias: nn.Parameter | None
    w2_bias: nn.Parameter | None
    waits_for_device = True
    """The host has to know how many rows each expert gets: no CUDA graph holds this."""

    def __init__(
        self,
        routing: Routing,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | nn.Module = "silu",
        is_gated: bool = True,
        has_bias: bool = False,
        correction_bias: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        reduce_results: bool = True,
        transposed: bool = False,
        interleaved: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if quant_config is not None:
            raise UnsupportedError(f"{prefix}: quantised experts are not supported yet")
        tp = get_tp_group()
        self.routing = routing
        self.num_experts = routing.num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.tp_rank, self.tp_size = tp.rank_in_group, tp.world_size
        self.inner = divide(intermediate_size, tp.world_size, "the inner size of an expert")
        if isinstance(activation, str):
            find = get_gated_activation if is_gated else get_activation
            activation = find(activation)
        self.activation = activation
        self.parts = ("gate", "up") if is_gated else ("up",)
        self.is_silu = isinstance(activation, SiluAndMul)
        self.correction_bias = correction_bias
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.reduce_results = reduce_results and tp.world_size > 1
        self.transposed = transposed
        self.interleaved = interleaved
        self._make_parameters(has_bias, params_dtype)
        self.gate_up: ops.PackedExperts | torch.Tensor = self.w13_weight.data
        self.down: ops.PackedExperts | torch.Tensor = self.w2_weight.data
        self.gate_up_bias = None if self.w13_bias is None else self.w13_bias.data
        self.down_bias = None if self.w2_bias is None else self.w2_bias.data
        self.kernel: MoeKernel | None = None

    def _make_parameters(self, has_bias: bool, dtype: torch.dtype | None) -> None:
        experts, hidden, inner = self.num_experts, self.hidden_size, self.inner
        rows = len(self.parts) * inner
        gate_up: dict[str, Any] = {
            "dtype": dtype,
            "weight_loader": self._load_gate_up,
            "shard_ids": tuple((e, part) for e in range(experts) for part in self.parts),
        }
        down: dict[str, Any] = {
            "dtype": dtype,
            "weight_loader": self._load_down,
            "shard_ids": tuple((e, "down") for e in range(experts)),
        }
        self.w13_weight = make_parameter(experts, rows, hidden, **gate_up)
        self.w2_weight = make_parameter(experts, hidden, inner, **down)
        if has_bias:
            self.w13_bias = make_parameter(experts, rows, **gate_up)
            self.w2_bias = make_parameter(experts, hidden, **down)
        else:
            self.register_parameter("w13_bias", None)
            self.register_parameter("w2_bias", None)

    def _load_gate_up(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """A weight or bias of one expert's gate or up projection, or all of them."""
        rest = param.shape[2:]
        whole = (self.intermediate_size, *rest)
        if isinstance(shard_id, tuple):
            expert, part = shard_id
            rows = take_shard(loaded_weight, 0, self.tp_rank, self.inner, whole)
            start = self.parts.index(part) * self.inner
            copy_weight(param.data[expert].narrow(0, start, self.inner), rows)
            return
        count = len(self.parts)
        loaded = self._untransposed(
            loaded_weight, (self.num_experts, count * self.intermediate_size, *rest)
        )
        parts = (
            [loaded[:, i::count] for i in range(count)]
            if self.interleaved
            else loaded.chunk(count, dim=1)
        )
        for index, tensor in enumerate(parts):
            rows = tensor.narrow(1, self.tp_rank * self.inner, self.inner)
            copy_weight(param.data.narrow(1, index * self.inner, self.inner), rows)

    def _load_down(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """A weight or bias of one expert's down projection, or all of them."""
        is_bias = param.dim() == 2
        whole = (self.hidden_size,) if is_bias else (self.hidden_size, self.intermediate_size)
        if isinstance(shard_id, tuple):
            target, loaded = param.data[shard_id[0]], loaded_weight
            if tuple(loaded.shape) != whole:
                raise WeightShapeError(loaded.shape, whole)
        else:
            target = param.data
            loaded = self._untransposed(loaded_weight, (self.num_experts, *whole))
        if not is_bias:
            loaded = loaded.narrow(-1, self.tp_rank * self.inner, self.inner)
        copy_weight(target, loaded)

    def _untransposed(self, loaded: torch.Tensor, expected: tuple[int, ...]) -> torch.Tensor:
        """All experts' tensor as (E, out, in), checked."""
        transposed = self.transposed and len(expected) == 3
        stored = (expected[0], expected[2], expected[1]) if transposed else expected
        if tuple(loaded.shape) != stored:
            raise WeightShapeError(loaded.shape, stored)
        return loaded.transpose(1, 2) if transposed else loaded

    def process_weights_after_loading(self) -> None:
        """Pack each expert; from here on there are no weight parameters."""
        if "w13_weight" in self._parameters:
            self.gate_up = ops.pack_experts(self.w13_weight.data)
            del self.w13_weight
            self.down = ops.pack_experts(self.w2_weight.data)
            del self.w2_weight
            self.kernel = self._make_kernel()

    def _make_kernel(self) -> MoeKernel | None:
        routing, activation = self.routing, self.activation
        if not isinstance(activation, GatedActivation) or activation.kernel is None:
            return None
        return MoeKernel.make(
            top_k=routing.top_k,
            scoring=routing.scoring_func,
            renormalize=routing.renormalize,
            num_groups=routing.num_expert_group,
            topk_group=routing.topk_group,
            scaling=routing.routed_scaling_factor,
            correction=self.correction_bias,
            gate=activation.kernel,
            alpha=activation.alpha,
            limit=activation.limit,
            weights=(self.gate_up, self.down),
            # Only one rank adds what every rank would.
            biases=(self.gate_up_bias, self.down_bias if self.tp_rank == 0 else None),
            weigh_input=self.apply_router_weight_on_input,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        chosen_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, hidden) and logits (T, E) -> (T, hidden); ``chosen_ids`` as in ``select_experts``."""
        if self.kernel is not None and self.kernel.takes(hidden_states, router_logits):
            output = self.kernel.run(hidden_states, router_logits, chosen_ids)
            return get_tp_group().all_reduce(output) if self.reduce_results else output
        weights, ids = select_experts(router_logits, self.routing, self.correction_bias, chosen_ids)
        at_once = max(1, _PAIRS_AT_ONCE // self.routing.top_k)
        if hidden_states.shape[0] <= at_once:
            output = self._run_experts(hidden_states, weights, ids)
        else:
            parts = zip(
                hidden_states.split(at_once),
                weights.split(at_once),
                ids.split(at_once),
                strict=True,
            )
            output = torch.cat([self._run_experts(*part) for part in parts])
        return get_tp_group().all_reduce(output) if self.reduce_results else output

    def _run_experts(
        self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """(T, hidden), weights (T, k) and expert ids (T, k) -> (T, hidden)."""
        num_tokens, top_k = ids.shape
        pairs = ids.flatten()
        order = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=self.num_experts)
        rows = hidden_states[order // top_k]
        if self.apply_router_weight_on_input:
            rows = (rows * weights.flatten()[order].unsqueeze(-1)).to(hidden_states.dtype)
        if self.is_silu and self.gate_up_bias is None:
            inner = ops.experts_gate_up_silu(rows, self.gate_up, counts)
        else:
            inner = self.activation.forward(
                ops.experts_linear(rows, self.gate_up, counts, self.gate_up_bias)
            )
        # Only one rank adds what every rank would.
        bias = self.down_bias if self.tp_rank == 0 else None
        computed = ops.experts_linear(inner, self.down, counts, bias)
        # Back in the order of tokens: a token's sum is the same whatever else is in the batch.
        output = torch.empty_like(computed).index_copy_(0, order, computed)
        wide = output.unflatten(0, (num_tokens, top_k)).float()
        if not self.apply_router_weight_on_input:
            wide = wide.mul_(weights.unsqueeze(-1))
        return wide.sum(1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, top_k={self.routing.top_k}, hidden={self.hidden_size}, "
            f"inner={self.intermediate_size}"
        )
