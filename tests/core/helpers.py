"""Configs, plans and a stand-in for the model, for tests of the core with integers only."""

from types import SimpleNamespace
from typing import Any

from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.config.misc import KVEventsConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

EOS = 2
BLOCK = 16


def full_spec(block_size: int = BLOCK) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=8, dtype="bfloat16")


def make_kv_cache_config(
    num_blocks: int, *specs: KVCacheSpec, hash_block_size: int | None = None
) -> KVCacheConfig:
    groups = [
        KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs or (full_spec(),))
    ]
    return KVCacheConfig(num_blocks, [], groups, hash_block_size=hash_block_size)


def make_vllm_config(
    *,
    max_model_len: int = 1024,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 256,
    prefix_caching: bool = True,
    hash_algo: str = "sha256",
    kv_events: bool = False,
    load_failure_policy: str | None = None,
    **scheduler: Any,
) -> VllmConfig:
    hf_config = SimpleNamespace(vocab_size=1000)
    return VllmConfig(
        model_config=ModelConfig(
            model="none",
            model_path="none",
            tokenizer="none",
            hf_config=hf_config,  # type: ignore[arg-type]
            hf_text_config=hf_config,  # type: ignore[arg-type]
            architecture="none",
            dtype_name="bfloat16",
            max_model_len=max_model_len,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            **scheduler,
        ),
        cache_config=CacheConfig(
            enable_prefix_caching=prefix_caching, prefix_caching_hash_algo=hash_algo
        ),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True) if kv_events else None,
        kv_transfer_config=(
            KVTransferConfig(kv_load_failure_policy=load_failure_policy)
            if load_failure_policy
            else None
        ),
    )


def make_scheduler(
    num_blocks: int = 65,
    *specs: KVCacheSpec,
    grammar_manager: Any = None,
    connector: Any = None,
    log_stats: bool = True,
    include_finished_set: bool = False,
    **config: Any,
) -> Scheduler:
    return Scheduler(
        make_vllm_config(**config),
        make_kv_cache_config(num_blocks, *specs),
        grammar_manager,
        BLOCK,
        log_stats,
        connector=connector,
        include_finished_set=include_finished_set,
    )


def make_request(
    request_id: str,
    prompt: list[int] | int,
    *,
    max_tokens: int | None = 16,
    priority: int = 0,
    arrival_time: float = 0.0,
    cache_salt: str | None = None,
    client_index: int = 0,
    block_hasher: Any = None,
    **params: Any,
) -> Request:
    """``prompt`` may be a length: then all prompts share the longest prefix they can."""
    if isinstance(prompt, int):
        prompt = [100 + i % 800 for i in range(prompt)]
    params.setdefault("eos_token_id", EOS)
    return Request(
        request_id,
        prompt,
        SamplingParams(max_tokens=max_tokens, **params),
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
        client_index=client_index,
        block_hasher=block_hasher,
    )


class FakeModel:
    """Follows a scheduler's orders as a model runner must, and checks that they make sense.

    Holds what the workers would: each request's block table and tokens. ``content`` maps
    (group, block id, offset) to the token whose KV lies there, with everything before it, so
    that reading a wrong or stale block is seen.
    """

    def __init__(self, scheduler: Scheduler, next_token: Any = None) -> None:
        self.scheduler = scheduler
        self.next_token = next_token or (lambda tokens: 3 + len(tokens) % 90)
        self.tables: dict[str, list[list[int]]] = {}
        self.tokens: dict[str, list[int]] = {}
        groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        self.specs = [group.kv_cache_spec for group in groups]
        self.content: dict[tuple[int, int, int], int] = {}

    def execute(
        self, output: SchedulerOutput, connector_output: KVConnectorOutput | None = None
    ) -> ModelRunnerOutput:
        for request_id in output.finished_req_ids:
            self.tables.pop(request_id, None)
            self.tokens.pop(request_id, None)
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            if cached.as_expected:
                computed[req_id] = len(self.tokens[req_id]) - 1
            else:
                computed[req_id] = cached.num_computed_tokens[i]
            block_ids = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                self.tokens[req_id] = list(cached.all_token_ids[req_id])
                self.tables[req_id] = [list(ids) for ids in block_ids or ()]
            elif block_ids is not None:
                for table, ids in zip(self.tables[req_id], block_ids, strict=True):
                    table += ids
        assert computed.keys() == output.num_scheduled_tokens.keys()
        total = sum(output.num_scheduled_tokens.values())
        assert total == output.total_num_scheduled_tokens
        config = self.scheduler.scheduler_config
        assert total <= config.max_num_batched_tokens and len(computed) <= config.max_num_seqs
        for req_id, start in computed.items():
            self._store(req_id, start, start + output.num_scheduled_tokens[req_id])
        sampled: list[list[int]] = []
        for req_id, start in computed.items():
            end = start + output.num_scheduled_tokens[req_id]
            tokens = self.tokens[req_id]
            assert end <= len(tokens)
            self._check_reads(req_id, start, end)
            if end < len(tokens):
                sampled.append([])
            else:
                token = self.next_token(tokens)
                tokens.append(token)
                sampled.append([token])
        return ModelRunnerOutput(
            req_ids=list(computed),
            req_id_to_index={req_id: i for i, req_id in enumerate(computed)},
            sampled_token_ids=sampled,
            kv_connector_output=connector_output,
        )

    def _fingerprint(self, req_id: str, position: int) -> int:
        return hash(tuple(self.tokens[req_id][: position + 1]))

    def _store(self, req_id: str, start: int, end: int) -> None:
        for group, spec in enumerate(self.specs):
            if not spec.uses_slot_mapping:
                continue
            table = self.tables[req_id][group]
            for position in range(start, end):
                block = table[position // spec.block_size]
                assert block != 0, f"{req_id} stores token {position} in the null block"
                key = group, block, position % spec.block_size
                self.content[key] = self._fingerprint(req_id, position)

    def _check_reads(self, req_id: str, start: int, end: int) -> None:
        for group, spec in enumerate(self.specs):
            if not spec.uses_slot_mapping:
                continue
            window = getattr(spec, "sliding_window", None)
            chunk = getattr(spec, "attention_chunk_size", None)
            first = 0
            if window:
                first = max(0, start - window + 1)
            elif chunk:
                first = start // chunk * chunk
            table = self.tables[req_id][group]
            for position in range(first, end):
                key = group, table[position // spec.block_size], position % spec.block_size
                assert self.content.get(key) == self._fingerprint(req_id, position), (
                    f"{req_id} reads a wrong token {position} in group {group}"
                )

    def step(self, connector_output: KVConnectorOutput | None = None) -> list[EngineCoreOutput]:
        """One whole step, and the integrity check after it; outputs of all clients."""
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        result = self.execute(output, connector_output)
        outputs = self.scheduler.update_from_output(output, result)
        self.scheduler.check_integrity()
        return [item for client in outputs.values() for item in client.outputs]

    def run(self, max_steps: int = 1000) -> dict[str, list[int]]:
        """Steps until nothing is left; the output tokens by request."""
        tokens: dict[str, list[int]] = {}
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                return tokens
            for item in self.step():
                tokens.setdefault(item.request_id, []).extend(item.new_token_ids)
        raise AssertionError(f"not done after {max_steps} steps")


def window_spec(window: int, block_size: int = BLOCK) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=8,
        dtype="bfloat16",
        sliding_window=window,
    )


def chunked_spec(chunk: int, block_size: int = BLOCK) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=8,
        dtype="bfloat16",
        attention_chunk_size=chunk,
    )


def mamba_spec(mode: str, block_size: int = BLOCK, num_speculative_blocks: int = 0) -> MambaSpec:
    return MambaSpec(
        block_size=block_size,
        shapes=((4, 8),),
        dtypes=("float32",),
        mamba_cache_mode=mode,
        num_speculative_blocks=num_speculative_blocks,
    )


def cross_spec(block_size: int = BLOCK) -> CrossAttentionSpec:
    return CrossAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=8, dtype="bfloat16")
