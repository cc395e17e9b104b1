"""Continuous batching: each step computes some tokens of some requests, within a token budget.

There is no prefill phase and no decode phase. A request has tokens, some of them computed; a
step takes those that run already, then admits those that wait, and gives each as many of its
uncomputed tokens as budget and blocks allow. When blocks run out, the last (or least urgent)
running request loses its blocks and computes its tokens again later.

Owns the queues and the states of requests. Blocks are the KV cache manager's; sampling,
detokenising and stop strings are others'.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import NullKVConnector
from vllm.errors import ConfigError, QueueFullError, VLLMValidationError
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import make_block_hasher
from vllm.v1.core.sched.integrity import check_integrity
from vllm.v1.core.sched.interface import GrammarManager, SchedulerInterface
from vllm.v1.core.sched.kv_transfer import KVTransferTracker
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.results import StepResults
from vllm.v1.core.sched.step import LastDecodes, Step
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutputs, SchedulerStats
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import ModelRunnerOutput

__all__ = ["Scheduler"]


class Scheduler(SchedulerInterface):
    """Schedules the requests of one engine.

    Args:
        vllm_config: ``scheduler_config`` and ``cache_config`` matter here.
        kv_cache_config: the plan of the cache.
        structured_output_manager: compiles and follows grammars; None where none may be asked.
        block_size: tokens of a block, where the plan has no cache groups to say.
        log_stats: whether ``SchedulerStats`` and request events are made.
        connector: the scheduler half of a KV connector.
        include_finished_set: tell each client which of its requests have ended.

    Raises:
        ConfigError: options that contradict each other.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        structured_output_manager: GrammarManager | None,
        block_size: int,
        log_stats: bool = False,
        *,
        connector: KVConnectorBase_V1 | None = None,
        include_finished_set: bool = False,
    ) -> None:
        config = vllm_config.scheduler_config
        self.vllm_config = vllm_config
        self.scheduler_config = config
        self.structured_output_manager = structured_output_manager
        self.log_stats = log_stats
        self.include_finished_set = include_finished_set
        self.max_num_running_reqs = config.max_num_seqs
        self.max_num_scheduled_tokens = config.max_num_batched_tokens
        self.max_num_queued_reqs = config.max_num_queued_reqs
        self.max_model_len = config.max_model_len
        self._overlaps = config.async_scheduling
        self._chunked = config.enable_chunked_prefill
        self._long_prefill_threshold = config.long_prefill_token_threshold if self._chunked else 0

        self.block_hasher = make_block_hasher(vllm_config.cache_config, kv_cache_config, block_size)
        events = vllm_config.kv_events_config
        self.kv_cache_manager = KVCacheManager(
            kv_cache_config,
            config.max_model_len,
            enable_caching=self.block_hasher is not None,
            hash_block_size=self.block_hasher.block_size if self.block_hasher else None,
            enable_kv_cache_events=events is not None and events.enable_kv_cache_events,
            max_tokens_per_step=config.max_num_batched_tokens,
        )
        usable = self.kv_cache_manager.block_pool.num_usable_blocks
        self._num_watermark_blocks = int(config.watermark * usable)
        self.max_request_tokens = self.kv_cache_manager.get_max_request_tokens()
        self._state_block_size = _state_block_size(kv_cache_config)
        self._counts_common_prefix = (
            vllm_config.device_config.device_type == "cuda"
            and not vllm_config.model_config.disable_cascade_attn
        )

        self.policy = SchedulingPolicy(config.policy)
        self.requests: dict[str, Request] = {}
        """Every request that has not ended, by id."""
        self.waiting = create_request_queue(self.policy)
        self.running: list[Request] = []
        self.waiting_for_grammar: dict[str, Request] = {}
        self._num_structured = 0
        self._num_needing_tokens = 0
        self.kv_transfer = KVTransferTracker(self, connector or NullKVConnector())
        self.finished_req_ids: set[str] = set()
        """Ended since the last step; the workers hear of them in the next."""
        self._preempted_req_ids: set[str] = set()
        # A connector may take tokens back that were counted as computed.
        self._follows_decodes = connector is None
        self._last_decodes: LastDecodes | None = None
        self.results = StepResults(self)
        # The request that did not fit, and the free blocks there were: no use in trying again
        # before more are free.
        self._stuck: tuple[str, int] | None = None
        self._num_preemptions = 0
        self._num_scheduled_tokens = 0

    # Requests come and go

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            raise VLLMValidationError(
                f"a request with id {request.request_id!r} is already being served",
                parameter="request_id",
                value=request.request_id,
            )
        limit = self.max_num_queued_reqs
        if limit is not None and self.num_waiting >= limit:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting, and --max-num-queued-reqs is {limit}: "
                "try again later"
            )
        self._check_fits(request)
        self.kv_transfer.connector.on_new_request(request)
        request.max_total_tokens = min(request.max_total_tokens, self.max_request_tokens)
        if self.block_hasher is not None and not request.has_block_hasher:
            request.set_block_hasher(self.block_hasher)
        if request.use_structured_output:
            if self.structured_output_manager is None:
                raise VLLMValidationError(
                    "structured outputs are not enabled", parameter="structured_outputs"
                )
            self.structured_output_manager.grammar_init(request)
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
            self.waiting_for_grammar[request.request_id] = request
        else:
            self.waiting.add_request(request)
        self.requests[request.request_id] = request
        self._num_structured += request.use_structured_output
        self._num_needing_tokens += request.needs_known_tokens
        if self.log_stats:
            request.record_event(EngineCoreEventType.QUEUED)

    def _check_fits(self, request: Request) -> None:
        """Refuse what would wait for ever."""
        num_prompt = request.num_prompt_tokens
        if num_prompt == 0:
            raise VLLMValidationError("the prompt is empty", parameter="prompt")
        if num_prompt >= self.max_request_tokens:
            if self.max_request_tokens < self.max_model_len:
                what = (
                    f"the KV cache of {self.kv_cache_manager.block_pool.num_usable_blocks} blocks "
                    f"holds {self.max_request_tokens} tokens of one request: shorten the prompt "
                    "or raise --kv-cache-memory-bytes"
                )
            else:
                what = f"--max-model-len is {self.max_model_len}: shorten the prompt"
            raise VLLMValidationError(
                f"the prompt has {num_prompt} tokens, and with at least one to generate, {what}",
                parameter="prompt",
                value=num_prompt,
            )

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> None:
        assert RequestStatus.is_finished(finished_status)
        if request_ids is None:
            request_ids = list(self.requests)
        elif isinstance(request_ids, str):
            request_ids = (request_ids,)
        any_running = False
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None:
                continue
            any_running |= request.status is RequestStatus.RUNNING
            self._leave_queue(request)
            request.status = finished_status
            self.finish(request)
        if any_running:
            self.drop_finished_from_running()

    def _leave_queue(self, request: Request) -> None:
        """Take ``request`` out of what it waits in; ``running`` is left to the caller."""
        if request.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            del self.waiting_for_grammar[request.request_id]
            if request.structured_output_request is not None:
                request.structured_output_request.cancel()
        elif request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
            self.kv_transfer.leave_loading(request)
        elif request.status is not RequestStatus.RUNNING:
            self.waiting.remove_request(request)

    def drop_finished_from_running(self) -> None:
        running = RequestStatus.RUNNING
        self.running = [request for request in self.running if request.status is running]

    def finish(self, request: Request) -> dict[str, Any] | None:
        """Forget a request whose status is final; returns its kv_transfer_params."""
        request_id = request.request_id
        if request.status is not RequestStatus.FINISHED_ERROR:
            # The last block may have been filled since blocks were last allocated.
            computed = min(request.num_computed_tokens, request.num_tokens)
            if self.kv_transfer.may_cache(request):
                self.kv_cache_manager.cache_blocks(request, computed)
                self.kv_cache_manager.publish_blocks()
        params = self.kv_transfer.release_blocks(request)
        del self.requests[request_id]
        self._num_structured -= request.use_structured_output
        self._num_needing_tokens -= request.needs_known_tokens
        self.finished_req_ids.add(request_id)
        self.results.forget_batch()
        if self.include_finished_set:
            self.results.add_finished(request)
        return params

    def fail_request(self, request: Request, message: str, error_type: str) -> None:
        """End ``request`` with an error that its client gets with the next outputs."""
        was_running = request.status is RequestStatus.RUNNING
        self._leave_queue(request)
        request.fail(message, error_type)
        params = self.finish(request)
        if was_running:
            self.drop_finished_from_running()
        self.results.add_ended(request, params)

    # A step

    def schedule(self) -> SchedulerOutput:
        self.kv_cache_manager.publish_blocks()
        if self.waiting_for_grammar:
            self._promote_compiled()
        step = Step(self.max_num_scheduled_tokens)
        if not self._schedule_decodes(step):
            self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        return self._make_scheduler_output(step)

    def _promote_compiled(self) -> None:
        """Requests whose grammar is there may be admitted; those whose isn't legal end."""
        for request in reversed(list(self.waiting_for_grammar.values())):
            state = request.structured_output_request
            assert state is not None
            if not state.is_grammar_ready:
                continue
            if state.error is not None:
                error_type = getattr(state, "error_type", None) or "VLLMValidationError"
                self.fail_request(request, state.error, error_type)
                continue
            del self.waiting_for_grammar[request.request_id]
            request.status = RequestStatus.WAITING
            self.waiting.prepend_request(request)

    def _schedule_decodes(self, step: Step) -> bool:
        """The common step at a third of the cost: all that run compute one token each.

        False, with nothing done, where one has more to compute or blocks might run out.
        """
        running = self.running.copy()
        if self._overlaps:
            # The last token of some may be on its way.
            running = [r for r in running if r.num_expected_tokens < r.max_total_tokens]
        needy = [
            index
            for index, request in enumerate(running)
            if request.num_expected_tokens > request.kv_capacity
            or request.num_expected_tokens - request.num_computed_tokens != 1
        ]
        kv = self.kv_cache_manager
        if (
            len(running) > step.budget
            or len(needy) * kv.max_blocks_per_token > kv.block_pool.get_num_free_blocks()
        ):
            return False
        for index in needy:
            if running[index].num_expected_tokens - running[index].num_computed_tokens != 1:
                return False
        step.is_decode = True
        step.running = running
        step.counts = [1] * len(running)
        step.blocks = [None] * len(running)
        step.budget -= len(running)
        for index in needy:
            step.blocks[index] = kv.allocate_next_token(running[index])
        return True

    def _schedule_running(self, step: Step) -> None:
        budget = step.budget
        add_request, add_count = step.running.append, step.counts.append
        add_blocks = step.blocks.append
        # Preemption takes from the end of the list, or, by priority, from anywhere in it.
        running = self.running
        if self.policy is SchedulingPolicy.PRIORITY:
            running = running.copy()
        for request in running:
            num_computed = request.num_computed_tokens
            num_new = request.num_expected_tokens - num_computed
            if request.num_expected_tokens >= request.max_total_tokens:
                continue
            if num_new != 1:
                if num_new <= 0 or request.status is not RequestStatus.RUNNING:
                    continue
                num_new = self._limit_chunk(num_computed, num_new, budget)
                if num_new == 0:
                    continue
            if budget < 1:
                break
            if num_computed + num_new <= request.kv_capacity:
                add_blocks(None)
            else:
                if request.status is not RequestStatus.RUNNING:
                    continue
                step.budget = budget
                new_blocks = self._allocate_or_preempt(request, num_new, step)
                budget = step.budget
                if new_blocks is None:
                    break
                add_blocks(new_blocks.get_block_ids())
            add_request(request)
            add_count(num_new)
            budget -= num_new
        step.budget = budget

    def _limit_chunk(self, num_computed: int, num_new: int, budget: int) -> int:
        """How many of ``num_new`` uncomputed tokens a step may take; 0 where it can't yet."""
        threshold = self._long_prefill_threshold
        if 0 < threshold < num_new:
            num_new = threshold
        if num_new > budget:
            if not self._chunked:
                return 0
            num_new = budget
        block = self._state_block_size
        if block and num_new > 1:
            # A state can be found again only where a chunk ends with a block.
            boundary = (num_computed + num_new) // block * block
            if boundary > num_computed:
                num_new = boundary - num_computed
        return num_new

    def _allocate_or_preempt(
        self, request: Request, num_new: int, step: Step
    ) -> KVCacheBlocks | None:
        """Blocks for ``request``, at others' expense; None where it had to go itself."""
        while True:
            blocks = self.kv_cache_manager.allocate_slots(request, num_new)
            if blocks is not None:
                return blocks
            if self.policy is SchedulingPolicy.PRIORITY:
                victim = max(self.running, key=lambda r: r.priority_key)
            else:
                victim = self.running[-1]
            self._unschedule(victim, step)
            self.preempt(victim)
            step.preempted.add(victim.request_id)
            if victim is request:
                return None

    def _unschedule(self, request: Request, step: Step) -> None:
        """Take ``request`` out of the step, if it is in it."""
        if step.remove(request):
            # Its new blocks were made findable for this step's sake.
            self.kv_cache_manager.uncache_blocks(request, request.num_computed_tokens)

    def preempt(self, request: Request, *, cache: bool = True) -> None:
        """A running request gives its blocks back and will compute its tokens again.

        Args:
            cache: its full blocks may be found by hash.
        """
        if cache:
            self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        self.kv_cache_manager.free(request)
        self.running.remove(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._preempted_req_ids.add(request.request_id)
        self.results.forget_batch()
        if self.log_stats:
            request.record_event(EngineCoreEventType.PREEMPTED)
        self.waiting.prepend_request(request)

    def _schedule_waiting(self, step: Step) -> None:
        waiting = self.waiting
        undecided: list[Request] = []
        while waiting and step.budget > 0 and len(self.running) < self.max_num_running_reqs:
            request = waiting.peek_request()
            if self._is_stuck(request):
                break
            admitted = self._try_admit(request, step)
            if admitted is None:
                undecided.append(waiting.pop_request())
            elif not admitted and (self.running or not self._reclaim_blocks(request)):
                break
        if undecided:
            waiting.prepend_requests(undecided)

    def _reclaim_blocks(self, for_request: Request) -> bool:
        """Take the blocks of the last waiting request that has loaded some; False without one.

        When nothing runs, nobody else would ever give any back.
        """
        for request in reversed(list(self.waiting)):
            if request.num_computed_tokens > 0 and request is not for_request:
                self.kv_cache_manager.free(request)
                request.num_computed_tokens = 0
                self._stuck = None
                return True
        return False

    def _is_stuck(self, request: Request) -> bool:
        if self._stuck is None:
            return False
        request_id, num_free = self._stuck
        if (
            self.running
            and request_id == request.request_id
            and self.kv_cache_manager.block_pool.get_num_free_blocks() <= num_free
        ):
            return True
        self._stuck = None
        return False

    def _try_admit(self, request: Request, step: Step) -> bool | None:
        """Let the first waiting request run, or start loading its KV.

        False: there is no room for it. None: its connector doesn't know yet what it can load.
        """
        kv = self.kv_cache_manager
        num_local = num_external = 0
        load_async = False
        hits: KVCacheBlocks | None = None
        is_fresh = request.num_computed_tokens == 0
        if is_fresh:
            hits, num_local = kv.get_computed_blocks(request)
            found, load_async = self.kv_transfer.get_num_external_tokens(request, num_local)
            if found is None:
                return None
            num_external = found
        num_computed = request.num_computed_tokens + num_local + num_external
        num_new = 0
        if not load_async:
            uncomputed = request.num_tokens - num_computed
            num_new = self._limit_chunk(num_computed, uncomputed, step.budget)
            if num_new == 0:
                return False
        new_blocks = kv.allocate_slots(
            request,
            num_new,
            num_local,
            hits,
            num_external_computed_tokens=num_external,
            delay_cache_blocks=load_async,
            num_reserved_blocks=self._num_watermark_blocks if self.running else 0,
        )
        if new_blocks is None:
            self._stuck = request.request_id, kv.block_pool.get_num_free_blocks()
            return False
        self.waiting.pop_request()
        self.kv_transfer.after_allocation(request, num_external)
        if is_fresh:
            self._record_hits(request, num_local, num_external)
        request.num_computed_tokens = num_computed
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_computed
        if load_async:
            self.kv_transfer.start_loading(request)
            return True
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        step.admitted.append(request)
        step.admitted_counts.append(num_new)
        step.budget -= num_new
        if self.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED)
        return True

    def _record_hits(self, request: Request, num_local: int, num_external: int) -> None:
        request.num_external_computed_tokens = num_external
        if request.num_preemptions:
            return
        kv = self.kv_cache_manager
        if kv.enable_caching and not request.skip_reading_prefix_cache:
            kv.prefix_cache_stats.record(request.num_tokens, num_local)
        self.kv_transfer.record(request.num_tokens - num_local, num_external)

    def _make_scheduler_output(self, step: Step) -> SchedulerOutput:
        new_reqs, cached_reqs, num_scheduled = self._make_request_data(step)
        num_tokens = self.max_num_scheduled_tokens - step.budget
        self._num_scheduled_tokens += num_tokens
        output = SchedulerOutput(
            scheduled_new_reqs=new_reqs,
            scheduled_cached_reqs=cached_reqs,
            num_scheduled_tokens=num_scheduled,
            total_num_scheduled_tokens=num_tokens,
            num_common_prefix_blocks=self._common_prefix_blocks(),
            finished_req_ids=self.finished_req_ids,
            preempted_req_ids=self._preempted_req_ids,
            new_block_ids_to_zero=self.kv_cache_manager.take_new_block_ids_to_zero(),
            has_structured_output_requests=(
                self._num_structured > 0 and step.has_structured_output_requests
            ),
        )
        self.finished_req_ids = set()
        self._preempted_req_ids = set()
        output.kv_connector_metadata = self.kv_transfer.connector.build_connector_meta(output)
        output.blocks_arriving = self.kv_transfer.take_blocks_arriving()
        step.advance()
        if self._overlaps:
            step.expect_tokens()
        return output

    def _make_request_data(
        self, step: Step
    ) -> tuple[list[NewRequestData], CachedRequestData, dict[str, int]]:
        last = self._last_decodes
        if last is not None:
            cached = step.follow(last)
            if cached is not None:
                return [], cached, last.num_scheduled_tokens
            self._last_decodes = None
        new, cached, num_scheduled = step.make_request_data(self.kv_cache_manager)
        if step.is_decode and not step.admitted and self._follows_decodes:
            self._last_decodes = LastDecodes(step.running, cached.req_ids, num_scheduled)
        return new, cached, num_scheduled

    def _common_prefix_blocks(self) -> list[int]:
        kv = self.kv_cache_manager
        if not self._counts_common_prefix or not self.running:
            return [0] * kv.num_kv_cache_groups
        return kv.get_num_common_prefix_blocks(self.running[0].request_id)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        if not scheduler_output.has_structured_output_requests:
            return None
        request_ids = []
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            # Of a prompt's chunks only the last one samples.
            if (
                request is not None
                and request.use_structured_output
                and request.num_computed_tokens >= request.num_tokens
            ):
                request_ids.append(request_id)
        if not request_ids:
            return None
        assert self.structured_output_manager is not None
        bitmask = self.structured_output_manager.grammar_bitmask(self.requests, request_ids)
        return GrammarOutput(request_ids, bitmask)

    # What a step has computed

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self.kv_cache_manager.publish_blocks()
        connector_output = model_runner_output.kv_connector_output
        if connector_output is not None:
            discarded = self.kv_transfer.handle_failures(connector_output)
        else:
            discarded = frozenset()
        for request_id, message in model_runner_output.request_errors.items():
            request = self.requests.get(request_id)
            if request is not None:
                self.fail_request(request, message, "EngineGenerateError")
        self.results.take_samples(model_runner_output, discarded)
        if connector_output is not None:
            self.kv_transfer.update(connector_output)
        return self.results.collect(self.make_stats())

    # Questions

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted, or not again since a preemption."""
        return len(self.waiting) + len(self.waiting_for_grammar) + self.kv_transfer.num_loading

    @property
    def needs_known_tokens(self) -> bool:
        """Some request cannot go on before the tokens of the last step are known."""
        return self._num_needing_tokens > 0

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), self.num_waiting

    def get_num_unfinished_requests(self) -> int:
        return len(self.requests)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def has_finished_requests(self) -> bool:
        return bool(self.finished_req_ids or self.results.has_unsent)

    def has_requests(self) -> bool:
        return (
            bool(self.requests)
            or self.has_finished_requests()
            or self.kv_transfer.waits_for_blocks
            or self.kv_transfer.connector.has_pending_push_work()
        )

    def make_stats(self) -> SchedulerStats | None:
        """Gauges of now and increments since the last call; None without ``log_stats``."""
        if not self.log_stats:
            return None
        prefix = self.kv_cache_manager.make_prefix_cache_stats()
        external = self.kv_transfer.take_stats()
        num_deferred = len(self.waiting_for_grammar) + self.kv_transfer.num_loading
        stats = SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=self.num_waiting,
            kv_cache_usage=self.kv_cache_manager.usage,
            prefix_cache_queries=prefix.queries,
            prefix_cache_hits=prefix.hits,
            external_prefix_cache_queries=external.queries,
            external_prefix_cache_hits=external.hits,
            num_preemptions=self._num_preemptions,
            num_scheduled_tokens=self._num_scheduled_tokens,
            num_waiting_by_reason={"capacity": len(self.waiting), "deferred": num_deferred},
            kv_connector=self.kv_transfer.take_counted(),
        )
        self._num_preemptions = 0
        self._num_scheduled_tokens = 0
        return stats

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while any request holds blocks."""
        return self.kv_cache_manager.reset_prefix_cache()

    def take_events(self) -> list[Any]:
        """KV events since the last call, of the pool and of the connector."""
        return [*self.kv_cache_manager.take_events(), *self.kv_transfer.connector.take_events()]

    def check_integrity(self) -> None:
        check_integrity(self)

    def shutdown(self) -> None:
        self.kv_transfer.connector.shutdown()


def _state_block_size(kv_cache_config: KVCacheConfig) -> int:
    """Tokens of a block of the state groups in "align" mode; 0 where there are none.

    Raises:
        ConfigError: several sizes.
    """
    sizes = {
        group.kv_cache_spec.block_size
        for group in kv_cache_config.kv_cache_groups
        if isinstance(spec := group.kv_cache_spec.manager_spec, MambaSpec)
        and spec.mamba_cache_mode == "align"
    }
    if len(sizes) > 1:
        raise ConfigError(
            f"state caches with blocks of {sorted(sizes)} tokens cannot be aligned: set "
            "--mamba-block-size",
            parameter="mamba_block_size",
        )
    return sizes.pop() if sizes else 0
