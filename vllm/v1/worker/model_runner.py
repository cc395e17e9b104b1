"""Runs the model on a step's work: prepare, forward, sample, publish.

Owns the model, the binding of its caches, the persistent batch and what each request needs on
this side. What only some requests or deployments use is an object that does nothing by default.
Knows nothing of scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
)
from vllm.forward_context import ForwardContext, KVScaleFinder, set_forward_context
from vllm.model_executor.layers.attention.kv_scales import KVScaleCalibration
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache.allocate import AllocatedKVCache, allocate_kv_cache
from vllm.v1.kv_cache.planner import BackendConstraints
from vllm.v1.kv_cache.published import publish_layout
from vllm.v1.kv_cache.views import group_kernel_blocks
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    KVConnectorOutput,
    LogprobsLists,
    ModelRunnerOutput,
)
from vllm.v1.sample.logits_processor import LogitsProcessors, load_logits_processors
from vllm.v1.sample.sampler import LogprobsTensors, Sampler, SamplerOutput
from vllm.v1.structured_output.bitmask import GrammarMask
from vllm.v1.worker.attention_groups import AttentionGroups
from vllm.v1.worker.block_table import BlockTable, MultiGroupBlockTable
from vllm.v1.worker.device import DeviceLayer
from vllm.v1.worker.encoder_step import make_encoder_step
from vllm.v1.worker.input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.input_preparation import InputPreparer, StepInputs
from vllm.v1.worker.kv_hooks import (
    ActiveConnectorStep,
    ConnectorStep,
    WriteWatch,
    make_block_zeroing,
    make_write_watch,
)
from vllm.v1.worker.kv_scales import (
    CalibrationRequest,
    KVScales,
    kv_scales_of,
    report_scales,
    restore_kv_scales,
)
from vllm.v1.worker.prompt_logprobs import PromptLogprobs
from vllm.v1.worker.utils import (
    bind_kv_cache,
    clear_layer_kv_caches,
    get_backend_constraints,
    get_kv_cache_specs,
    get_kv_sharing_targets,
    share_kv_caches,
)

__all__ = ["ModelRunner", "OpenStep"]


@dataclass(slots=True)
class OpenStep:
    """A step between its forward pass and sampling; ``logits`` is None where no row samples."""

    inputs: StepInputs
    logits: torch.Tensor | None
    prompt_logprobs: dict[str, LogprobsLists]
    kv_connector_output: KVConnectorOutput | None


class ModelRunner:
    """One worker's model.

    Args:
        device: copies and buffers of the device that the model runs on.
        make_connector: makes the worker half of a KV connector for the planned cache, if one is
            configured.
    """

    block_table_class: ClassVar[type[BlockTable]] = BlockTable
    batch_class: ClassVar[type[InputBatch]] = InputBatch
    preparer_class: ClassVar[type[InputPreparer]] = InputPreparer

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: DeviceLayer,
        make_connector: Callable[[KVCacheConfig], KVConnectorBase_V1] | None = None,
    ) -> None:
        self.vllm_config = vllm_config
        self.device = device
        model_config = vllm_config.model_config
        self.vocab_size = model_config.get_vocab_size()
        self.sampler = Sampler(model_config.logprobs_mode)
        self.logits_processors = LogitsProcessors(
            cls(vllm_config, device.device, device.pin_memory)
            for cls in load_logits_processors(vllm_config)
        )
        self.requests: dict[str, CachedRequestState] = {}
        # Requests without a seed of their own draw one here.
        self._seeds = np.random.Generator(np.random.PCG64(model_config.seed))
        self.kv_caches: list[torch.Tensor] = []
        self._open: OpenStep | None = None
        self._steady: tuple[list[str], list[int], np.ndarray] | None = None
        """Requests that went on in the last step, and their rows; None once rows have changed."""
        self._make_connector = make_connector
        self._connector = ConnectorStep()
        self._write_watch = WriteWatch()
        self.layers: dict[str, AttentionLayerBase] = {}
        self._scale_finder: KVScaleFinder | None = None
        self._kv_scales: KVScales = {}
        """Of layers by name, as ``_calibrate`` found them."""

    # ---- start-up -----------------------------------------------------------------------------

    def load_model(self) -> None:
        from vllm.model_executor.model_loader import get_model

        self.set_model(get_model(self.vllm_config))

    def set_model(self, model: Any) -> None:
        """Use ``model``: a module with ``compute_logits``, whose ``static_forward_context`` names
        the layers that own caches.
        """
        self.model = model
        self.layers = model.static_forward_context
        self._compute_logits: Callable[[torch.Tensor], torch.Tensor] = model.compute_logits
        self.prompt_logprobs = PromptLogprobs(
            model.compute_logits,
            self.vocab_size,
            self.device,
            self.vllm_config.model_config.logprobs_mode.endswith("logits"),
        )

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """What each layer keeps; layers without a cache of their own are left out."""
        return get_kv_cache_specs(self.layers, self.vllm_config)

    def get_kv_cache_constraints(self) -> dict[str, BackendConstraints]:
        """What the attention backend of each layer with a cache can read."""
        return get_backend_constraints(self.layers, self.get_kv_cache_spec())

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the caches, hand each layer its view, and make the batch for them."""
        config = self.vllm_config
        publish_layout(kv_cache_config.kv_cache_layout, config.instance_id, self)
        caches = self._caches = self._allocate(kv_cache_config)
        share_kv_caches(caches, get_kv_sharing_targets(self.layers), kv_cache_config)
        bind_kv_cache(caches, self.layers, self.kv_caches)
        self._zeroing = make_block_zeroing(caches, kv_cache_config)
        self._write_watch = make_write_watch(caches, kv_cache_config)
        self.attention_groups = AttentionGroups(
            kv_cache_config, self.layers, config, self.device.device
        )
        scheduler_config, max_model_len = config.scheduler_config, config.model_config.max_model_len
        tables = []
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            tables.append(
                self.block_table_class(
                    spec.block_size,
                    kv_cache_config.kernel_block_size(index),
                    scheduler_config.max_num_seqs,
                    spec.max_num_blocks_per_req(config, max_model_len),
                    self.device,
                )
            )
        self.batch = self.batch_class(
            scheduler_config.max_num_seqs,
            max_model_len,
            self.vocab_size,
            MultiGroupBlockTable(tables),
            self.logits_processors.make_batch_update_builder(),
        )
        self._encoder = make_encoder_step(kv_cache_config, self.model, self.device)
        self._preparer = self.preparer_class(
            scheduler_config.max_num_batched_tokens,
            scheduler_config.max_num_seqs,
            len(tables),
            self.device,
        )
        if config.cache_config.calculate_kv_scales:
            self._calibrate(kv_cache_config)
        if self._make_connector is not None:
            self._connector = ActiveConnectorStep(self._make_connector(kv_cache_config))
        self._connector.register(self._views_in_blocks(), kv_scales_of(self.layers))

    def _calibrate(self, kv_cache_config: KVCacheConfig) -> None:
        """Give layers the scales of their caches, for as long as the engine lives.

        Raises:
            ConfigError: numbers of the model are not finite.
        """
        request = CalibrationRequest.make(
            self.vllm_config, self.vocab_size, kv_cache_config, self.batch.block_table
        )
        self._scale_finder = calibration = KVScaleCalibration()
        try:
            self.execute_model(request.first_step())
            self.execute_model(request.last_step())
            self.device.synchronize()
        finally:
            # Nothing of that run stays.
            self._scale_finder = None
            self._caches.debugger.restart()
        self._kv_scales = calibration.scales
        report_scales(self._kv_scales, self.layers, request.num_tokens)

    def _allocate(self, kv_cache_config: KVCacheConfig) -> AllocatedKVCache:
        return allocate_kv_cache(kv_cache_config, self.device.device)

    def _views_in_blocks(self) -> dict[str, torch.Tensor]:
        """Each layer's view in manager blocks, as connectors take it."""
        num_blocks = self._caches.config.num_blocks
        return {
            name: group_kernel_blocks(cache, num_blocks) for name, cache in self._caches.items()
        }

    # ---- sleep ----------------------------------------------------------------------------------

    def release_kv_cache(self, release: Callable[[torch.Tensor], None]) -> None:
        """Give the pool's memory back; no request holds blocks.

        Args:
            release: frees the memory of the 1-D tensor that it gets, whose addresses stay valid.
        """
        self._connector.unregister()
        release(self._caches.backing)

    def restore_kv_cache(self) -> None:
        """The pool's memory is there again, with nothing in it."""
        self._caches.debugger.restart()
        self._connector.restore(self._views_in_blocks())

    def release_model(self) -> None:
        """Let go of the weights, and of all that was made of them."""
        self.layers = {}
        del self.model, self._compute_logits, self.prompt_logprobs, self.attention_groups

    def restore_model(self) -> None:
        """Load the weights again; caches stay where they are."""
        self.load_model()
        restore_kv_scales(self.layers, self._kv_scales)
        self.kv_caches.clear()
        bind_kv_cache(self._caches, self.layers, self.kv_caches)
        self.attention_groups = AttentionGroups(
            self._caches.config, self.layers, self.vllm_config, self.device.device
        )

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Run the model once without a cache, so that the first request finds it ready."""
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device.device)
        with set_forward_context(ForwardContext(None, self.layers)):
            hidden = self.model(ids, torch.arange(num_tokens, device=self.device.device))
        self._compute_logits(hidden[-1:])
        self.device.synchronize()

    # ---- a step -------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Prepare and run the forward pass, and sample unless a grammar has a say.

        Returns:
            None where some request's output is structured: ``sample_tokens`` ends the step.
        """
        assert self._open is None, "the step before this one was not sampled"
        self._update_requests(scheduler_output)
        self._zeroing.zero_new_blocks(scheduler_output)
        self._write_watch.expect_transfers(scheduler_output.blocks_arriving)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return self._only_transfer(scheduler_output)
        batch = self.batch
        step = self._preparer.prepare(batch, self._counts(scheduler_output))
        self._encoder.prepare(batch, step)
        hidden, transferred = self._forward(scheduler_output, step)
        prompt_logprobs = self.prompt_logprobs.collect(batch, step, hidden)
        logits = self._logits(step, hidden) if step.sample_rows.size else None
        self._open = OpenStep(step, logits, prompt_logprobs, transferred)
        if scheduler_output.has_structured_output_requests:
            return None
        return self._end_step(None)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """Sample from the logits of the step that ``execute_model`` left open."""
        return self._end_step(grammar_output)

    def _counts(self, scheduler_output: SchedulerOutput) -> np.ndarray:
        """int64 ``(R,)``: tokens that each row of the batch computes, at least one."""
        count = self.batch.num_reqs
        if scheduler_output.total_num_scheduled_tokens == count:
            return np.ones(count, dtype=np.int64)
        scheduled = scheduler_output.num_scheduled_tokens
        return np.fromiter(
            map(scheduled.__getitem__, self.batch.req_ids), dtype=np.int64, count=count
        )

    def _end_step(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        step = self._open
        assert step is not None, "there is no step to sample"
        self._open = None
        if step.logits is None:
            return self._publish(step, None)
        return self._publish(step, self._sample(step.logits, step.inputs, grammar_output))

    def _forward(
        self, scheduler_output: SchedulerOutput, step: StepInputs
    ) -> tuple[torch.Tensor, KVConnectorOutput | None]:
        """Hidden states ``(T, hidden)``, and what the connector has to report."""
        metadata = self.attention_groups.build_metadata(
            step.attention, scheduler_output.num_common_prefix_blocks
        )
        context = ForwardContext(metadata, self.layers, kv_scale_finder=self._scale_finder)
        self._write_watch.begin(self.batch, step)
        self._connector.begin(scheduler_output, context)
        with set_forward_context(context):
            self._encoder.run()
            hidden = self.model(step.input_ids, step.positions)
        transferred = self._connector.end(scheduler_output)
        self._write_watch.end()
        return hidden, transferred

    def _logits(self, step: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(S, V)`` of the rows that sample."""
        if step.sample_rows.size != step.num_tokens:
            hidden = hidden[self.device.to_device(step.logits_indices)]
        return self._compute_logits(hidden)

    def _only_transfer(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """A step without tokens: transfers go on."""
        self._connector.begin(scheduler_output, ForwardContext(None, self.layers))
        transferred = self._connector.end(scheduler_output)
        if transferred is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        return ModelRunnerOutput([], {}, [], kv_connector_output=transferred)

    def _sample(
        self, logits: torch.Tensor, step: StepInputs, grammar_output: GrammarOutput | None
    ) -> SamplerOutput:
        batch, mask, may_stop = self.batch, None, frozenset[str]()
        if grammar_output is not None and grammar_output.structured_output_request_ids:
            row_of = {batch.req_ids[r]: i for i, r in enumerate(step.sample_rows.tolist())}
            mask = GrammarMask(grammar_output, row_of)
            if batch.min_tokens_stop_ids:
                # A grammar that is complete leaves nothing else to do, however short the output.
                may_stop = frozenset(mask.allow_nothing_but(batch.min_tokens_stop_ids))
        metadata = batch.sampling_metadata(step.sample_rows, may_stop)
        if not self.logits_processors:
            return self.sampler(logits, metadata, mask)
        edits = self.logits_processors.edits_for(batch.num_reqs, step.sample_rows)
        return self.sampler(logits, metadata, mask, *edits)

    def _publish(self, step: OpenStep, sampled: SamplerOutput | None) -> ModelRunnerOutput:
        """Put the sampled tokens in the batch and in the answer."""
        batch = self.batch
        batch.num_computed[: step.inputs.num_reqs] += step.inputs.num_scheduled
        output = ModelRunnerOutput(
            req_ids=batch.req_ids.copy(),
            req_id_to_index=batch.req_id_to_index.copy(),
            sampled_token_ids=[],
            prompt_logprobs_dict=step.prompt_logprobs,
            kv_connector_output=step.kv_connector_output,
        )
        if sampled is None:
            output.sampled_token_ids = [[] for _ in output.req_ids]
            return output
        rows = step.inputs.sample_rows
        token_ids = self.device.to_host(sampled.sampled_token_ids)
        if token_ids.min() < 0:
            for row in rows[token_ids < 0].tolist():
                output.request_errors[batch.req_ids[row]] = (
                    "the model's logits leave no token to choose: they are NaN, or everything is "
                    "forbidden by allowed_token_ids, bad_words or structured_outputs"
                )
            rows, token_ids = rows[token_ids >= 0], token_ids[token_ids >= 0]
        batch.append_tokens(rows, token_ids)
        sampled_ids: list[list[int]] = token_ids[:, None].tolist()
        if rows.size == batch.num_reqs:
            output.sampled_token_ids = sampled_ids
        else:
            output.sampled_token_ids = [[] for _ in output.req_ids]
            for row, tokens in zip(rows.tolist(), sampled_ids, strict=True):
                output.sampled_token_ids[row] = tokens
        if sampled.logprobs is not None:
            self._publish_logprobs(step.inputs.sample_rows, sampled.logprobs, output)
        return output

    def _publish_logprobs(
        self, sample_rows: np.ndarray, logprobs: LogprobsTensors, output: ModelRunnerOutput
    ) -> None:
        ids = self.device.to_host(logprobs.logprob_token_ids)
        values = self.device.to_host(logprobs.logprobs)
        ranks = self.device.to_host(logprobs.sampled_token_ranks)
        batch = self.batch
        for i, row in enumerate(sample_rows[logprobs.rows].tolist()):
            if output.sampled_token_ids[row]:
                width = 1 + min(int(batch.num_logprobs[row]), self.vocab_size)
                output.logprobs[batch.req_ids[row]] = LogprobsLists(
                    ids[i : i + 1, :width], values[i : i + 1, :width], ranks[i : i + 1]
                )

    # ---- requests come, go and go on ------------------------------------------------------------

    def _update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Bring requests and batch to what the scheduler says."""
        batch, requests = self.batch, self.requests
        cached = scheduler_output.scheduled_cached_reqs
        if (
            cached.as_expected
            and self._steady is not None
            and not scheduler_output.finished_req_ids
            and not scheduler_output.scheduled_new_reqs
        ):
            self._append_blocks(cached, self._steady[1])
            self.logits_processors.update_state(batch.changes.take(batch.num_reqs))
            return
        empty_rows: list[int] = []
        for req_id in scheduler_output.finished_req_ids:
            if requests.pop(req_id, None) is not None:
                self.prompt_logprobs.forget(req_id)
                if req_id in batch.req_id_to_index:
                    empty_rows.append(batch.remove(req_id))
        unscheduled = batch.req_id_to_index.keys() - scheduler_output.num_scheduled_tokens.keys()
        resumed = cached.resumed_req_ids
        if resumed:
            unscheduled |= resumed & batch.req_id_to_index.keys()
        empty_rows.extend(batch.remove(req_id) for req_id in unscheduled)

        if empty_rows:
            self._steady = None
            # Sets have another order in each process, and the ranks of a model must put a
            # request into the same row: their sums go row by row.
            empty_rows.sort()

        entering: list[CachedRequestState] = []
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            seed = self._seeds.integers(1 << 64, dtype=np.uint64) if params.seed is None else 0
            state = CachedRequestState(
                req_id=new.req_id,
                prompt_token_ids=new.prompt_token_ids,
                sampling_params=params,
                block_ids=tuple(list(ids) for ids in new.block_ids),
                num_computed_tokens=new.num_computed_tokens,
                seed=int(seed) if params.seed is None else params.seed % (1 << 64),
                encoder_token_ids=new.encoder_token_ids,
            )
            requests[new.req_id] = state
            self.prompt_logprobs.track(state)
            entering.append(state)
        entering += self._update_cached(cached)

        if entering or empty_rows:
            self._steady = None
            for state in entering:
                if empty_rows:
                    batch.replace(empty_rows.pop(), state)
                else:
                    batch.add(state)
            batch.condense(empty_rows)
        self.logits_processors.update_state(batch.changes.take(batch.num_reqs))

    def _update_cached(self, cached: CachedRequestData) -> list[CachedRequestState]:
        """Note progress and new blocks; returns the requests that are not in the batch."""
        batch = self.batch
        outside: list[CachedRequestState] = []
        if self._steady is None or self._steady[0] != cached.req_ids:
            row_of = batch.req_id_to_index
            rows = [row_of.get(req_id, -1) for req_id in cached.req_ids]
            known = bool(rows) and min(rows) >= 0
            self._steady = (cached.req_ids, rows, np.array(rows)) if known else None
        if self._steady is not None:
            _, rows, row_array = self._steady
            if not cached.as_expected:
                batch.rewind(row_array, cached.num_computed_tokens, cached.num_output_tokens)
        else:
            for i, (req_id, row) in enumerate(zip(cached.req_ids, rows, strict=True)):
                computed, num_output = cached.num_computed_tokens[i], cached.num_output_tokens[i]
                if row >= 0:
                    batch.rewind(np.array([row]), [computed], [num_output])
                else:
                    state = self.requests[req_id]
                    state.num_computed_tokens = computed
                    state.keep_output(num_output)
                    outside.append(state)
        self._append_blocks(cached, rows)
        return outside

    def _append_blocks(self, cached: CachedRequestData, rows: list[int]) -> None:
        """Note new blocks of requests; ``rows`` of the batch, -1 for those outside it."""
        if not any(cached.new_block_ids):
            return
        block_table = self.batch.block_table
        for i, new_blocks in enumerate(cached.new_block_ids):
            if new_blocks is None:
                continue
            if rows[i] >= 0:
                block_table.append_row(rows[i], new_blocks)
                continue
            req_id = cached.req_ids[i]
            state = self.requests[req_id]
            if req_id in cached.resumed_req_ids:
                state.block_ids = tuple(list(ids) for ids in new_blocks)
            else:
                for held, ids in zip(state.block_ids, new_blocks, strict=True):
                    held.extend(ids)

    # ---- for others -----------------------------------------------------------------------------

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, from any thread, when the KV connector has something to say."""
        self._connector.register_callback(callback)

    def get_kv_connector_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What other engines need to connect to this worker's caches."""
        return self._connector.get_handshake_metadata()

    def close(self) -> None:
        """Let go of the caches; the runner cannot run any more."""
        self._connector.close()
        try:
            self._write_watch.close()
        finally:
            clear_layer_kv_caches(self.layers)
        self.kv_caches.clear()

    def get_model(self) -> nn.Module:
        return self.model
