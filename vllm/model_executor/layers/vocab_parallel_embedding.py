"""Token embedding and output head, cut over the tensor-parallel ranks by vocabulary.

Tied, the head is the embedding module itself: one packed copy serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    WeightShapeError,
    copy_weight,
    make_parameter,
)

__all__ = ["ParallelLMHead", "VocabParallelEmbedding"]


class VocabParallelEmbedding(nn.Module):
    """Rows of a (vocabulary, hidden) table; rank r holds the r-th run of them.

    The vocabulary is padded with zero rows to a multiple of the ranks; ids are never in them.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if quant_config is not None:
            raise UnsupportedError(f"{prefix}: quantised weights are not supported yet")
        tp = get_tp_group()
        self.num_embeddings = num_embeddings
        self.org_vocab_size = org_num_embeddings or num_embeddings
        self.embedding_dim = embedding_dim
        self.tp_size = tp.world_size
        self.num_embeddings_per_partition = -(-num_embeddings // tp.world_size)
        self.first_id = tp.rank_in_group * self.num_embeddings_per_partition
        self.weight = make_parameter(
            self.num_embeddings_per_partition,
            embedding_dim,
            dtype=params_dtype,
            weight_loader=self.weight_loader,
        )
        self.packed_weight: ops.PackedWeight | torch.Tensor = self.weight.data
        self.bias_data: torch.Tensor | None = None

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        expected = (self.org_vocab_size, *param.shape[1:])
        if tuple(loaded_weight.shape) != expected:
            raise WeightShapeError(loaded_weight.shape, expected)
        rows = loaded_weight[self.first_id : self.first_id + self.num_embeddings_per_partition]
        copy_weight(param.data[: rows.shape[0]], rows)
        param.data[rows.shape[0] :].zero_()

    def process_weights_after_loading(self) -> None:
        """Pack the table; from here on there is no ``weight`` parameter."""
        if "weight" in self._parameters:
            self.packed_weight = ops.pack_weight(self.weight.data)
            del self.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> (T, hidden)."""
        if self.tp_size == 1:
            return ops.embedding(input_ids, self.packed_weight)
        part = ops.embedding_part(
            input_ids, self.packed_weight, self.first_id, self.num_embeddings_per_partition
        )
        return get_tp_group().all_reduce(part)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary: (T, hidden) -> (T, rows)."""
        return ops.logits(hidden_states, self.packed_weight, self.bias_data)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


class ParallelLMHead(VocabParallelEmbedding):
    """An output head of its own: the same table, multiplied with instead of read from."""

    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, params_dtype, org_num_embeddings, quant_config, prefix
        )
        if bias:
            self.bias = make_parameter(
                self.num_embeddings_per_partition,
                dtype=params_dtype,
                weight_loader=self.weight_loader,
            )
            self.bias_data = self.bias.data
        else:
            self.register_parameter("bias", None)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
        """The module to use as head instead of this one: the embedding itself."""
        return embed_tokens

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the output head is multiplied with (project), not read from")
