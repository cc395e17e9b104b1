"""A hybrid model whose tokens a few lines of Python can predict from the tokens before them.

Layer 0 keeps states: the last three tokens, and a weighted sum of all. Layer 1 is real attention
over the whole context with equal weights. Any state or slot that is lost, stale or someone else's
changes the next token.
"""

from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

ARCHITECTURE = "StateTestForCausalLM"
VOCAB, WIDTH = 97, 16
KERNEL = 4
DECAY = 0.75


def tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(V, W) embedding; weights of the last three tokens (3, W); (3 W, V) head."""
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(VOCAB, WIDTH, generator=generator),
        torch.randn(KERNEL - 1, WIDTH, generator=generator),
        torch.randn(3 * WIDTH, VOCAB, generator=generator),
    )


def predict(tokens: list[int]) -> int:
    """The next token, from the whole text at once."""
    embedding, kernel, head = (table.double() for table in tables())
    rows = embedding[torch.tensor(tokens)]
    last = torch.zeros(KERNEL - 1, WIDTH, dtype=torch.float64)
    if len(rows) > 1:
        before = rows[max(0, len(rows) - KERNEL) : -1]
        last[KERNEL - 1 - len(before) :] = before
    decays = DECAY ** torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
    state = (rows * decays[:, None]).sum(0)
    features = torch.cat([(last * kernel).sum(0) + rows[-1], state, rows.mean(0)])
    return int((features @ head).argmax())


class StateMetadataBuilder(AttentionMetadataBuilder[CommonAttentionMetadata]):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CommonAttentionMetadata:
        return common_attn_metadata


class StateBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "STATE_TEST"

    @staticmethod
    def get_impl_cls() -> Any:
        raise TypeError("the layer computes for itself")

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class StateLayer(nn.Module, MambaBase):
    """Rows of a convolution, and a decayed sum."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        shapes = MambaStateShapeCalculator.mamba1(
            tp_size=1, intermediate_size=WIDTH, state_size=1, conv_kernel=KERNEL
        )
        self.declare_states(vllm_config, prefix, shapes)
        self.kernel = tables()[1]

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, W) -> outputs of convolution and sum, each (T, W)."""
        mixed, summed = rows.clone(), torch.zeros_like(rows)
        context = get_forward_context()
        if context.attn_metadata is None:
            return mixed, summed
        meta = context.attn_metadata[self.layer_name]
        conv_cache, sum_cache = self.kv_cache
        # (B, steps, W) in SD order, (B, W, steps) in DS.
        if self.state_spec.conv_state_layout == "DS":
            conv_cache = conv_cache.transpose(1, 2)
        starts = meta.query_start_loc_cpu.tolist()
        column = self.state_spec.state_column
        jobs = []
        for r in range(meta.num_reqs):
            before, after = int(meta.num_computed_tokens_cpu[r]), int(meta.seq_lens_cpu[r])
            source = int(meta.block_table_tensor[r, column(before)])
            target = int(meta.block_table_tensor[r, column(after)])
            jobs.append((r, target, before, conv_cache[source].clone(), sum_cache[source].clone()))
        every = self.state_spec.mamba_cache_mode == "all"
        for r, target, before, conv, total in jobs:
            if before == 0:
                # Zeroed when the block was taken: nothing is reset here.
                assert not conv.any()
                assert not total.any()
            total = total[:, 0]
            for t in range(starts[r], starts[r + 1]):
                mixed[t] = rows[t] + (conv * self.kernel).sum(0)
                total = total * DECAY + rows[t]
                summed[t] = total
                conv = torch.cat([conv[1:], rows[t : t + 1]])
                known = before + t - starts[r] + 1
                if every and known % self.state_spec.block_size == 0:
                    boundary = int(meta.block_table_tensor[r, column(known)])
                    conv_cache[boundary] = conv
                    sum_cache[boundary] = total[:, None]
            conv_cache[target] = conv
            sum_cache[target] = total[:, None]
        return mixed, summed


class StateTestForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.embedding, _, self.head = tables()
        self.state = StateLayer(vllm_config, "model.layers.0.state")
        self.attn = Attention(1, WIDTH, 1.0, prefix="model.layers.1.attn")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = self.embedding[input_ids]
        mixed, summed = self.state(rows)
        mean = self.attn(torch.zeros_like(rows), rows, rows)
        return torch.cat([mixed, summed, mean], dim=1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head

    def load_weights(self, weights: Any) -> set[str]:
        return set()
