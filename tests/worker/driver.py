"""Plays the scheduler by hand: says what runs in each step, and keeps the block tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers

from vllm.config import CacheConfig, LoadConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.config import resolve_model
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

VOCAB = 160
MAX_LEN = 128
MAX_REQS = 8


def make_hf_model(seed: int = 0, **overrides) -> transformers.LlamaForCausalLM:
    """A random fp32 Llama whose greedy output is not one token over and over."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    config = transformers.LlamaConfig(**{**shape, **overrides})
    return transformers.LlamaForCausalLM(config).eval()


def make_config(
    model: Path,
    *,
    block_size: int = 16,
    logprobs_mode: str = "raw_logprobs",
    logits_processors: tuple[str, ...] = (),
    max_num_seqs: int = MAX_REQS,
    kv_cache_memory_bytes: int = 4 << 20,
) -> VllmConfig:
    resolved = resolve_model(str(model))
    return VllmConfig(
        model_config=ModelConfig(
            model=str(model),
            model_path=resolved.model_path,
            tokenizer=resolved.tokenizer,
            hf_config=resolved.hf_config,
            hf_text_config=resolved.hf_text_config,
            architecture=resolved.architecture,
            dtype_name="float32",
            max_model_len=MAX_LEN,
            logprobs_mode=logprobs_mode,
            logits_processors=logits_processors,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=512, max_num_seqs=max_num_seqs, max_model_len=MAX_LEN
        ),
        cache_config=CacheConfig(
            block_size=block_size, kv_cache_memory_bytes=kv_cache_memory_bytes
        ),
        load_config=LoadConfig(use_tqdm_on_load=False),
    )


def start_worker(config: VllmConfig) -> CPUWorker:
    """A worker taken through its whole start-up, on one thread: the model is tiny."""
    from vllm.v1.kv_cache.planner import get_kv_cache_configs

    worker = CPUWorker(config, local_rank=0, rank=0, distributed_init_method="tcp://127.0.0.1:0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        worker.init_device()
    worker.load_model()
    (kv_cache_config,) = get_kv_cache_configs(
        config,
        [worker.get_kv_cache_spec()],
        [worker.determine_available_memory()],
        [worker.get_kv_cache_constraints()],
    )
    worker.kv_cache_config = kv_cache_config
    worker.initialize_from_config(kv_cache_config)
    worker.compile_or_warm_up_model()
    return worker


@dataclass
class Running:
    prompt: list[int]
    params: SamplingParams
    blocks: list[int]
    computed: int = 0
    output: list[int] = field(default_factory=list)
    known: bool = False
    preempted: bool = False
    sent_blocks: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class Driver:
    """Runs requests on a worker; each step names the requests and their token counts."""

    def __init__(self, worker: CPUWorker, block_size: int) -> None:
        self.worker = worker
        self.block_size = block_size
        self.requests: dict[str, Running] = {}
        self.finished: set[str] = set()
        self.preempted: set[str] = set()
        # Taken from the end, so that neighbours in a table are not neighbours in memory.
        self.free = [*range(1, 120, 2), *range(2, 120, 2)]

    def add(self, req_id: str, prompt: list[int], **params) -> None:
        params.setdefault("temperature", 0.0)
        self.requests[req_id] = Running(list(prompt), SamplingParams(**params), [])

    def finish(self, req_id: str) -> None:
        self.free += self.requests.pop(req_id).blocks
        self.finished.add(req_id)

    def preempt(self, req_id: str) -> None:
        request = self.requests[req_id]
        self.free += request.blocks
        request.blocks, request.computed, request.sent_blocks = [], 0, 0
        request.preempted = True
        self.preempted.add(req_id)

    def step(self, scheduled: dict[str, int], grammar: GrammarOutput | None = None):
        output = self.schedule(scheduled, grammar is not None)
        result = self.worker.execute_model(output)
        if grammar is not None:
            assert result is None
            result = self.worker.sample_tokens(grammar)
        assert result is not None
        self.take(scheduled, result)
        return result

    def take(self, scheduled: dict[str, int], result: ModelRunnerOutput) -> None:
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            request.computed += count
            request.output += result.sampled_token_ids[result.req_id_to_index[req_id]]

    def schedule(self, scheduled: dict[str, int], structured: bool = False) -> SchedulerOutput:
        new: list[NewRequestData] = []
        cached = CachedRequestData.make_empty()
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            needed = -(-(request.computed + count) // self.block_size)
            while len(request.blocks) < needed:
                request.blocks.append(self.free.pop())
            fresh = request.blocks[request.sent_blocks :]
            request.sent_blocks = len(request.blocks)
            if not request.known:
                request.known = True
                new.append(
                    NewRequestData(
                        req_id,
                        request.prompt,
                        request.params,
                        (list(request.blocks),),
                        request.computed,
                    )
                )
                continue
            cached.req_ids.append(req_id)
            cached.num_computed_tokens.append(request.computed)
            cached.num_output_tokens.append(len(request.output))
            if request.preempted:
                request.preempted = False
                cached.resumed_req_ids.add(req_id)
                cached.all_token_ids[req_id] = request.tokens
                cached.new_block_ids.append((list(request.blocks),))
            else:
                cached.new_block_ids.append((fresh,) if fresh else None)
        finished, self.finished = self.finished, set()
        preempted, self.preempted = self.preempted, set()
        return SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict(scheduled),
            total_num_scheduled_tokens=sum(scheduled.values()),
            num_common_prefix_blocks=[0],
            finished_req_ids=finished,
            preempted_req_ids=preempted,
            has_structured_output_requests=structured,
        )

    def pending(self, req_id: str) -> int:
        """Tokens of the request that are known and not yet computed."""
        request = self.requests[req_id]
        return len(request.tokens) - request.computed

    def run(self, counts: dict[str, int], chunk: int = 1 << 30) -> None:
        """Run until each request has that many output tokens, prompts in chunks."""
        while True:
            todo = {
                req_id: min(chunk, self.pending(req_id))
                for req_id, count in counts.items()
                if len(self.requests[req_id].output) < count
            }
            if not todo:
                return
            self.step(todo)


def hf_greedy(model: transformers.LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by transformers, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
