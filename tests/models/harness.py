"""Runs a loaded model over real paged caches, without a scheduler: chunks, batches, decoding."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm.config import (
    AttentionConfig,
    CacheConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.transformers_utils.config import resolve_model
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.worker.attention_groups import AttentionGroups
from vllm.v1.worker.utils import bind_kv_cache

BLOCK_SIZE = 16
VOCAB = 199
"""Of the tiny checkpoints."""
TOKENS = torch.randint(0, VOCAB, (70,), generator=torch.Generator().manual_seed(3)).tolist()


def make_config(
    model: str | Path,
    *,
    dtype: str = "float32",
    max_model_len: int = 256,
    load_format: str = "auto",
    tensor_parallel_size: int = 1,
    backend: str | None = None,
    seed: int = 0,
    disable_sliding_window: bool = False,
    hf_overrides: dict[str, Any] | None = None,
) -> VllmConfig:
    resolved = resolve_model(str(model), hf_overrides=hf_overrides)
    return VllmConfig(
        model_config=ModelConfig(
            model=str(model),
            model_path=resolved.model_path,
            tokenizer=resolved.tokenizer,
            hf_config=resolved.hf_config,
            hf_text_config=resolved.hf_text_config,
            architecture=resolved.architecture,
            dtype_name=dtype,
            max_model_len=max_model_len,
            seed=seed,
            disable_sliding_window=disable_sliding_window,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=1024, max_num_seqs=8, max_model_len=max_model_len
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE),
        parallel_config=ParallelConfig(tensor_parallel_size=tensor_parallel_size),
        load_config=LoadConfig(load_format=load_format, use_tqdm_on_load=False),
        attention_config=AttentionConfig(backend=backend),
    )


class PagedModel:
    """A model with caches for a few sequences, whose blocks are scattered."""

    def __init__(self, vllm_config: VllmConfig, num_sequences: int = 4, model: Any = None) -> None:
        self.config = vllm_config
        self.model = model if model is not None else get_model(vllm_config)
        self.layers = self.model.static_forward_context
        self.blocks_per_sequence = -(-vllm_config.model_config.max_model_len // BLOCK_SIZE)
        num_blocks = 1 + num_sequences * self.blocks_per_sequence
        cache_config = _plan(self.layers, vllm_config, num_blocks)
        bind_kv_cache(allocate_kv_cache(cache_config), self.layers, [])
        self.groups = AttentionGroups(cache_config, self.layers, vllm_config, torch.device("cpu"))
        self.num_groups = len(cache_config.kv_cache_groups)
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(num_sequences, -1).to(torch.int32)
        self.computed = [0] * num_sequences

    @torch.inference_mode()
    def step(self, chunks: dict[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Compute the next tokens of some sequences together; sequence -> logits (T, vocab)."""
        rows = list(chunks)
        sizes = [len(chunks[row]) for row in rows]
        before = [self.computed[row] for row in rows]
        ids = torch.tensor([token for row in rows for token in chunks[row]])
        positions = torch.cat(
            [torch.arange(start, start + n) for start, n in zip(before, sizes, strict=True)]
        )
        metadata = self.groups.build_metadata(
            [self._metadata(rows, before, sizes, positions)] * self.num_groups
        )
        with set_forward_context(ForwardContext(metadata, self.layers)):
            hidden = self.model(ids, positions)
        logits = self.model.compute_logits(hidden).float()
        for row, size in zip(rows, sizes, strict=True):
            self.computed[row] += size
        return dict(zip(rows, logits.split(sizes), strict=True))

    def logits(self, tokens: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits (T, vocab) of one whole sequence, computed ``chunk`` tokens at a time."""
        self.computed[0] = 0
        chunk = chunk or len(tokens)
        return torch.cat(
            [self.step({0: tokens[i : i + chunk]})[0] for i in range(0, len(tokens), chunk)]
        )

    def _metadata(
        self, rows: list[int], before: list[int], sizes: list[int], positions: torch.Tensor
    ) -> CommonAttentionMetadata:
        starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        lens = torch.tensor([b + s for b, s in zip(before, sizes, strict=True)], dtype=torch.int32)
        row_of = torch.repeat_interleave(torch.tensor(rows), torch.tensor(sizes))
        blocks = self.tables[row_of, positions // BLOCK_SIZE].long()
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu=lens,
            num_computed_tokens_cpu=torch.tensor(before, dtype=torch.int32),
            num_reqs=len(rows),
            num_actual_tokens=sum(sizes),
            max_query_len=max(sizes),
            max_seq_len=int(lens.max()),
            block_table_tensor=self.tables[rows].contiguous(),
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        )


def _plan(layers: dict[str, Any], vllm_config: VllmConfig, num_blocks: int) -> KVCacheConfig:
    """One group for each kind of layer, layers side by side."""
    by_spec: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        by_spec.setdefault(layer.get_kv_cache_spec(vllm_config), []).append(name)
    tensors, offset = [], 0
    for spec, names in by_spec.items():
        page = spec.page_size_bytes
        tensors.append(
            KVCacheTensor(
                size=0,
                layers=tuple(names),
                layer_stride=page * num_blocks,
                block_stride=page,
                offset=offset,
            )
        )
        offset += len(names) * page * num_blocks
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[replace(tensor, size=offset) for tensor in tensors],
        kv_cache_groups=[KVCacheGroupSpec(names, spec) for spec, names in by_spec.items()],
    )
