"""The model runner on a CUDA device: captured steps, and results that come later.

A step is launched and not waited for. Its tokens are counted at once, stand in for themselves in
the next step's inputs, and are read when somebody asks for the result. What only some requests
need (log-probabilities, penalties, grammars) takes the same general path as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.kv_cache.allocate import AllocatedKVCache, allocate_kv_cache
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import (
    KVConnectorOutput,
    LogprobsLists,
    ModelRunnerOutput,
    PendingModelRunnerOutput,
)
from vllm.v1.sample.ops.triton_sample import DrawScratch, sample_rows
from vllm.v1.sample.ops.triton_truncate import truncate_rows
from vllm.v1.sample.sampler import LogprobsTensors
from vllm.v1.worker.gpu.block_table import DeviceBlockTable
from vllm.v1.worker.gpu.cuda_graphs import (
    CapturedStep,
    StepGraphs,
    capturing,
    decode_graph_sizes,
    prompt_graph_sizes,
)
from vllm.v1.worker.gpu.device import CUDADeviceLayer, SampleCopies, SampleCopy
from vllm.v1.worker.gpu.input_batch import AwaitedTokens, DeviceInputBatch
from vllm.v1.worker.gpu.input_preparation import DeviceInputPreparer, DeviceStepInputs
from vllm.v1.worker.gpu.sleep import SleepMemory, weights_size
from vllm.v1.worker.input_preparation import StepInputs
from vllm.v1.worker.kv_hooks import ConnectorStep, WriteWatch
from vllm.v1.worker.model_runner import ModelRunner, OpenStep

__all__ = ["GPUModelRunner"]

logger = init_logger(__name__)

# Larger batches run without a graph: their kernels are long enough to hide the launches.
_LARGEST_GRAPH = 512
_WARM_UP_PROMPT = 72
_NO_TOKEN = (
    "the model's logits leave no token to choose: they are NaN, or everything is forbidden by "
    "allowed_token_ids, bad_words or structured_outputs"
)


@dataclass(slots=True)
class _Launched(PendingModelRunnerOutput):
    """A step that runs on the device; ``output`` lacks its tokens."""

    runner: GPUModelRunner
    output: ModelRunnerOutput
    awaited: AwaitedTokens
    places: np.ndarray
    copy: SampleCopy
    logprobs: LogprobsTensors | None

    def result(self) -> ModelRunnerOutput:
        return self.runner.finish(self)


class GPUModelRunner(ModelRunner):
    """Args:
    overlapped: ``sample_tokens`` returns a ``PendingModelRunnerOutput``, and the next step may
        be launched before its result is asked for; at most one is outstanding then.
    sleep_memory: where weights and caches lie if they are to be given back; it is told of both.
    """

    block_table_class: ClassVar[type[DeviceBlockTable]] = DeviceBlockTable
    batch_class: ClassVar[type[DeviceInputBatch]] = DeviceInputBatch
    preparer_class: ClassVar[type[DeviceInputPreparer]] = DeviceInputPreparer
    batch: DeviceInputBatch
    _preparer: DeviceInputPreparer

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: CUDADeviceLayer,
        make_connector: Callable[[KVCacheConfig], KVConnectorBase_V1] | None = None,
        *,
        overlapped: bool = False,
        sleep_memory: SleepMemory | None = None,
    ) -> None:
        super().__init__(vllm_config, device, make_connector)
        self._overlapped = overlapped
        self._sleep_memory = sleep_memory
        self._graphs: StepGraphs[CapturedStep] = StepGraphs()
        self._prompt_graphs: StepGraphs[torch.Tensor] = StepGraphs()
        self._captured: CapturedStep | None = None
        self._recaptures = False

    # ---- start-up -----------------------------------------------------------------------------

    def load_model(self) -> None:
        super().load_model()
        if self._sleep_memory is not None:
            self._sleep_memory.take_weights(self.model)

    def _allocate(self, kv_cache_config: KVCacheConfig) -> AllocatedKVCache:
        if self._sleep_memory is None:
            return super()._allocate(kv_cache_config)
        return allocate_kv_cache(
            kv_cache_config, self.device.device, allocate=self._sleep_memory.allocate_pool
        )

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_kv_cache(kv_cache_config)
        self._scratch = DrawScratch.make(
            self.batch.max_num_reqs, self.vocab_size, self.device.device
        )
        self._copies = SampleCopies(self.batch.max_num_reqs, self.device.device)

    @torch.inference_mode()
    def profile(self, num_tokens: int, num_rows: int) -> None:
        """Run the largest step there can be, without a cache, for the memory that it takes."""
        device = self.device.device
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        # Tables of rotations end at the longest request; a step holds the tokens of several.
        longest = self.vllm_config.model_config.max_model_len
        with set_forward_context(ForwardContext(None, self.layers)):
            hidden = self.model(ids, torch.arange(num_tokens, device=device) % longest)
        logits = self._compute_logits(hidden[:num_rows])
        # What the general sampler holds at once: the logits in float32, sorted, and their sums.
        wide = logits.float()
        torch.cumsum(wide.softmax(dim=-1), dim=-1, dtype=torch.float64)
        self.device.synchronize()

    @property
    def captures(self) -> bool:
        """Small steps run as CUDA graphs: nothing in the model waits for the device."""
        return (
            self.device.device.type == "cuda"
            and not self.vllm_config.model_config.enforce_eager
            and not self._connector.works_between_layers
            and all(layer.get_attn_backend().fits_cuda_graphs for layer in self.layers.values())
            and not any(getattr(m, "waits_for_device", False) for m in self.model.modules())
        )

    @property
    def decode_graph_sizes(self) -> list[int]:
        """Requests of the captured decodes, descending."""
        if not self.captures:
            return []
        return decode_graph_sizes(
            min(self.vllm_config.scheduler_config.max_num_seqs, _LARGEST_GRAPH)
        )

    @property
    def prompt_graph_sizes(self) -> list[int]:
        """Tokens of the captured steps with prompts, descending; none where launches of one of
        the model's backends depend on more.
        """
        layers, config = self.layers.values(), self.vllm_config
        if not self.captures or not all(x.get_attn_backend().fits_prompt_graphs for x in layers):
            return []
        if config.parallel_config.tensor_parallel_size > 1:
            # Sums too large for one kernel have not been tried inside graphs beside small ones.
            return []
        model_config = config.model_config
        weights = weights_size(self.model, self.device.device.type) / model_config.dtype.itemsize
        return prompt_graph_sizes(
            config.scheduler_config.max_num_batched_tokens,
            weights / model_config.hf_text_config.num_hidden_layers,
        )

    @torch.inference_mode()
    def warm_up_kernels(self) -> None:
        """Run a prompt, and decodes beside and without one, as requests would; in graphs once these
        are captured.
        """
        limit = self.vllm_config.scheduler_config
        sizes = self._preparer.prompt_graph_sizes
        most = sizes[-1] if sizes else limit.max_num_batched_tokens
        # A step holds the last prompt and the decode beside it.
        length = min(_WARM_UP_PROMPT, limit.max_model_len - 3, most - 1)
        if length < 1:
            return
        # Nobody may own the null block, which these requests write to.
        connector, self._connector = self._connector, ConnectorStep()
        watch, self._write_watch = self._write_watch, WriteWatch()
        names = ["warm-up"] if limit.max_num_seqs == 1 else ["warm-up", "warm-up beside it"]
        computed: dict[str, int] = {}
        for name in names:
            scheduled = dict.fromkeys(computed, 1) | {name: length}
            self._run_by_hand(computed, scheduled, length)
        self._run_by_hand(computed, dict.fromkeys(names, 1), length)
        self._run_by_hand(computed, {}, length, finished=set(names))
        self._connector, self._write_watch = connector, watch
        self._caches.debugger.restart()
        self.device.synchronize()

    def _run_by_hand(
        self,
        computed: dict[str, int],
        scheduled: dict[str, int],
        length: int,
        finished: set[str] = frozenset(),  # type: ignore[assignment]
    ) -> None:
        """One step of requests whose blocks are all the null block."""
        cached = CachedRequestData.make_empty()
        new = []
        for name, count in scheduled.items():
            if name not in computed:
                blocks = tuple(
                    [0] * -(-(length + 2) // table.block_size)
                    for table in self.batch.block_table.tables
                )
                params = SamplingParams(temperature=1.0, seed=0)
                if computed:
                    params = SamplingParams(temperature=1.0, seed=0, top_k=5, top_p=0.9)
                new.append(NewRequestData(name, [0] * length, params, blocks, 0))
                computed[name] = 0
            else:
                cached.req_ids.append(name)
                cached.new_block_ids.append(None)
                cached.num_computed_tokens.append(computed[name])
                cached.num_output_tokens.append(computed[name] - length + 1)
            computed[name] += count
        output = self.execute_model(
            SchedulerOutput(
                scheduled_new_reqs=new,
                scheduled_cached_reqs=cached,
                num_scheduled_tokens=scheduled,
                total_num_scheduled_tokens=sum(scheduled.values()),
                num_common_prefix_blocks=[0] * len(self.batch.block_table.tables),
                finished_req_ids=set(finished),
            )
        )
        if isinstance(output, PendingModelRunnerOutput):
            output.result()

    @torch.inference_mode()
    def capture_graphs(self) -> int:
        """Capture steps of all sizes; returns how many."""
        prompts, decodes = self.prompt_graph_sizes, self.decode_graph_sizes
        if not decodes:
            return 0
        with capturing() as pool:
            # Those that need most memory first.
            self._prompt_graphs.capture(prompts, self._prompts_of, pool)
            self._graphs.capture(decodes, self._decode_of, pool)
        self._preparer.largest_graph = decodes[0]
        self._preparer.prompt_graph_sizes = prompts[::-1]
        return len(prompts) + len(decodes)

    def release_model(self) -> None:
        # Captured steps read weights whose addresses end.
        self._recaptures = bool(self._graphs)
        self._clear_graphs()
        self._preparer.largest_graph = 0
        self._preparer.prompt_graph_sizes = []
        super().release_model()

    def recapture_graphs(self) -> None:
        """Capture again what was lost with the model."""
        if self._recaptures:
            self.capture_graphs()
            self._recaptures = False

    def _clear_graphs(self) -> None:
        self._graphs.clear()
        self._prompt_graphs.clear()
        self._captured = None

    def _prompts_of(self, size: int) -> Callable[[], torch.Tensor]:
        """The model on ``size`` tokens of prompts and decodes, in the same buffers."""
        preparer = self._preparer
        attention = preparer.capture_prompt_metadata(self.batch, size)
        context = ForwardContext(self.attention_groups.build_metadata(attention), self.layers)

        def run() -> torch.Tensor:
            with set_forward_context(context):
                return self.model(preparer.input_ids[:size], preparer.positions[:size])

        return run

    def _decode_of(self, size: int) -> Callable[[], CapturedStep]:
        """A decode step of ``size`` requests on the buffers that real ones are prepared in."""
        preparer = self._preparer
        attention = preparer.capture_metadata(self.batch, size)
        context = ForwardContext(self.attention_groups.build_metadata(attention), self.layers)
        draw = preparer.graph_draw(size)

        def run() -> CapturedStep:
            with set_forward_context(context):
                hidden = self.model(preparer.input_ids[:size], preparer.positions[:size])
            logits = self._compute_logits(hidden)
            sample_rows(logits, draw.scales, draw.uniforms, self._scratch, preparer.sampled[:size])
            return CapturedStep(hidden, logits)

        return run

    # ---- a step -------------------------------------------------------------------------------

    def _forward(
        self, scheduler_output: SchedulerOutput, step: StepInputs
    ) -> tuple[torch.Tensor, KVConnectorOutput | None]:
        assert isinstance(step, DeviceStepInputs)
        self._captured = None
        if not step.graph_size and not step.prompt_graph_size:
            return super()._forward(scheduler_output, step)
        # The graph's kernels read what building the metadata writes.
        context = ForwardContext(self.attention_groups.build_metadata(step.attention), self.layers)
        self._write_watch.begin(self.batch, step)
        self._connector.begin(scheduler_output, context)
        if step.graph_size:
            self._captured = self._graphs.replay(step.graph_size)
            hidden = self._captured.hidden
        else:
            hidden = self._prompt_graphs.replay(step.prompt_graph_size)
        transferred = self._connector.end(scheduler_output)
        self._write_watch.end()
        return hidden[: step.num_tokens], transferred

    def _logits(self, step: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
        assert isinstance(step, DeviceStepInputs)
        if self._captured is None:
            if step.sample_rows.size != step.num_tokens:
                assert step.device_logits_indices is not None
                hidden = hidden.index_select(0, step.device_logits_indices)
            return self._compute_logits(hidden)
        logits = self._captured.logits[: step.num_reqs]
        if step.sample_rows.size == step.num_reqs or self._draws_on_device(step):
            return logits
        return logits[self.device.to_device(step.sample_rows)]

    def _draws_on_device(self, step: DeviceStepInputs) -> bool:
        return step.draw is not None and not self.logits_processors

    def _end_step(  # type: ignore[override]
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        opened = self._open
        assert opened is not None, "there is no step to sample"
        self._open = None
        if opened.logits is None:
            return self._publish(opened, None)
        step = opened.inputs
        assert isinstance(step, DeviceStepInputs)
        places = np.arange(step.sample_rows.size)
        sampled = self._preparer.sampled
        logprobs = None
        if grammar_output is None and self._draws_on_device(step):
            draw, logits = step.draw, opened.logits
            assert draw is not None
            sampled = sampled[: logits.shape[0]]
            if self._captured is not None:
                places = step.sample_rows
            else:
                sample_rows(logits, draw.scales, draw.uniforms, self._scratch, sampled)
            if draw.limits is not None:
                truncate_rows(
                    logits, draw.scales, draw.uniforms, draw.limits, self._scratch, sampled
                )
        else:
            chosen = self._sample(opened.logits, step, grammar_output)
            sampled = sampled[: places.size].copy_(chosen.sampled_token_ids)
            logprobs = chosen.logprobs
        launched = self._launch(opened, sampled, places, logprobs)
        # Custom processors follow each request's tokens.
        waits = not self._overlapped or bool(self.logits_processors)
        return launched.result() if waits else launched

    def _launch(
        self,
        opened: OpenStep,
        sampled: torch.Tensor,
        places: np.ndarray,
        logprobs: LogprobsTensors | None,
    ) -> _Launched:
        """Count what the step computes; ``places`` are where ``sampled`` has its rows' tokens."""
        batch, step = self.batch, opened.inputs
        copy = self._copies.start(sampled)
        batch.num_computed[: step.num_reqs] += step.num_scheduled
        return _Launched(
            self,
            ModelRunnerOutput(
                req_ids=batch.req_ids.copy(),
                req_id_to_index=batch.req_id_to_index.copy(),
                sampled_token_ids=[],
                prompt_logprobs_dict=opened.prompt_logprobs,
                kv_connector_output=opened.kv_connector_output,
            ),
            batch.expect_tokens(step.sample_rows, places),
            places,
            copy,
            logprobs,
        )

    def finish(self, launched: _Launched) -> ModelRunnerOutput:
        """The output of a step that the device has done."""
        output, rows = launched.output, launched.awaited.rows
        token_ids = launched.copy.wait()[launched.places]
        tokens = self.batch.take_tokens(launched.awaited, token_ids)
        if rows.size == len(output.req_ids) and token_ids.min() >= 0:
            output.sampled_token_ids = [[token] for token in tokens]
        else:
            output.sampled_token_ids = [[] for _ in output.req_ids]
            for row, token in zip(rows.tolist(), tokens, strict=True):
                if token >= 0:
                    output.sampled_token_ids[row].append(token)
                else:
                    output.request_errors[output.req_ids[row]] = _NO_TOKEN
        if launched.logprobs is not None:
            self._add_logprobs(launched, launched.logprobs, output)
        return output

    def _add_logprobs(
        self, launched: _Launched, logprobs: LogprobsTensors, output: ModelRunnerOutput
    ) -> None:
        ids = self.device.to_host(logprobs.logprob_token_ids)
        values = self.device.to_host(logprobs.logprobs)
        ranks = self.device.to_host(logprobs.sampled_token_ranks)
        rows, states = launched.awaited.rows, launched.awaited.states
        for i, entry in enumerate(logprobs.rows.tolist()):
            if output.sampled_token_ids[int(rows[entry])]:
                wanted = states[entry].sampling_params.logprobs
                assert wanted is not None
                width = 1 + (self.vocab_size if wanted < 0 else min(wanted, self.vocab_size))
                output.logprobs[states[entry].req_id] = LogprobsLists(
                    ids[i : i + 1, :width], values[i : i + 1, :width], ranks[i : i + 1]
                )

    def close(self) -> None:
        self._clear_graphs()
        super().close()
