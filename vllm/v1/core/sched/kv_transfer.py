"""The scheduler's dealings with a KV connector: loads under way, blocks that must stay, failures.

Owns which requests are loading and whose blocks outlive them. Moves no bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    NullKVConnector,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, PrefixCacheStats
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput

__all__ = ["KVTransferTracker"]

_SEND = "send"
_RECEIVE = "receive"


class KVTransferTracker:
    """Loads and sends of one scheduler's requests.

    A request whose load is asynchronous is in ``loading`` until the worker half says that all
    of it has arrived, or failed; its blocks are not given to anybody before that, even if the
    request is aborted. Likewise the blocks of an ended request that are still being sent.
    """

    def __init__(
        self, scheduler: Scheduler, connector: KVConnectorBase_V1 | NullKVConnector
    ) -> None:
        self._scheduler = scheduler
        self._kv = scheduler.kv_cache_manager
        self.connector = connector
        self._is_null = isinstance(connector, NullKVConnector)
        if isinstance(connector, KVConnectorBase_V1):
            connector.bind_kv_cache_manager(self._kv)
        transfer_config = scheduler.vllm_config.kv_transfer_config
        self._recompute_failed = (
            transfer_config is not None and transfer_config.kv_load_failure_policy == "recompute"
        )
        self._loading: dict[str, Request] = {}
        self._arrived_bad: set[str] = set()
        """Of those loading, the ones some of whose blocks are known to be bad."""
        self._load_nothing: set[str] = set()
        """Requests that a load has failed; they are computed."""
        self._holding: dict[str, tuple[Request, set[str]]] = {}
        """Ended requests whose blocks must stay, and what for."""
        self._quarantined: dict[str, str] = {}
        """Requests that go on without their load -> the row that its blocks are in."""
        self._stats = PrefixCacheStats()
        self._counted: dict[str, float] = {}
        self._watched = envs.VLLM_KV_CACHE_DEBUG and not self._is_null
        self._arriving: set[int] = set()
        """Blocks of the synchronous loads of this step, in debug mode."""

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    @property
    def loading(self) -> Collection[Request]:
        return self._loading.values()

    @property
    def holding(self) -> Collection[str]:
        """Rows of blocks that must stay though no living request has them."""
        return self._holding.keys() | set(self._quarantined.values())

    @property
    def waits_for_blocks(self) -> bool:
        """Something may still be written into blocks that no living request has."""
        return bool(self._quarantined) or any(
            _RECEIVE in reasons for _, reasons in self._holding.values()
        )

    # Before a step

    def get_num_external_tokens(self, request: Request, num_local: int) -> tuple[int | None, bool]:
        """Tokens beyond ``num_local`` that can be loaded, and whether asynchronously."""
        if self._is_null or request.request_id in self._load_nothing:
            return 0, False
        if request.sampling_params.prompt_logprobs is not None:
            # They come of computing the prompt here.
            return 0, False
        found, load_async = self.connector.get_num_new_matched_tokens(request, num_local)
        if not found:
            return found, False
        if not load_async:
            # The last token is computed here, for its logits.
            found = min(found, request.num_tokens - 1 - num_local)
        return found, load_async and found > 0

    def after_allocation(self, request: Request, num_external: int) -> None:
        if not self._is_null:
            blocks = self._kv.get_blocks(request.request_id)
            self.connector.update_state_after_alloc(request, blocks, num_external)
            if self._watched and num_external:
                self._arriving |= _unshared(blocks)

    def start_loading(self, request: Request) -> None:
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        self._loading[request.request_id] = request

    def take_blocks_arriving(self) -> set[int]:
        """Blocks that the connector may write from now on, in debug mode; nobody else has them."""
        if not self._watched:
            return set()
        arriving, self._arriving = self._arriving, set()
        held = [rid for rid, (_, reasons) in self._holding.items() if _RECEIVE in reasons]
        for request_id in (*self._loading, *held, *self._quarantined.values()):
            arriving |= _unshared(self._kv.get_blocks(request_id))
        return arriving

    def record(self, num_queried: int, num_found: int) -> None:
        if not self._is_null:
            self._stats.record(num_queried, num_found)

    def take_stats(self) -> PrefixCacheStats:
        stats, self._stats = self._stats, PrefixCacheStats()
        return stats

    def take_counted(self) -> dict[str, float]:
        """What the connector's worker halves have counted since the last call."""
        counted, self._counted = self._counted, {}
        return counted

    # A request ends

    def leave_loading(self, request: Request) -> None:
        """``request`` ends while its blocks are being written: they stay until that ends."""
        del self._loading[request.request_id]
        self._arrived_bad.discard(request.request_id)
        self._holding[request.request_id] = request, {_RECEIVE}

    def may_cache(self, request: Request) -> bool:
        """The content of the blocks of ``request`` is known to be complete."""
        return request.request_id not in self._holding

    def release_blocks(self, request: Request) -> dict[str, Any] | None:
        """Free the blocks of an ended request as soon as may be; returns the answer's params."""
        request_id = request.request_id
        self._load_nothing.discard(request_id)
        if self._is_null:
            self._kv.free(request)
            return None
        block_ids = self._kv.get_block_ids(request_id)
        if isinstance(self.connector, SupportsHMA):
            must_stay, params = self.connector.request_finished_all_groups(request, block_ids)
        else:
            assert len(block_ids) == 1, (
                f"{type(self.connector).__name__} does not support several cache groups"
            )
            must_stay, params = self.connector.request_finished(request, block_ids[0])
        if must_stay:
            self._holding.setdefault(request_id, (request, set()))[1].add(_SEND)
        if request_id not in self._holding:
            self._kv.free(request)
        return params

    # After a step

    def update(self, output: KVConnectorOutput) -> None:
        """Take in which transfers have ended."""
        if isinstance(output.kv_connector_stats, dict):
            for name, value in output.kv_connector_stats.items():
                self._counted[name] = self._counted.get(name, 0) + value
        self.connector.update_connector_output(output)
        for request_id in output.stuck_recving:
            self._give_up(request_id)
        for request_id in output.finished_recving or ():
            self._end_load(request_id, failed=False)
        for request_id in output.failed_recving:
            self._end_load(request_id, failed=True)
        for request_id in output.finished_sending or ():
            self._stop_holding(request_id, _SEND)

    def _stop_holding(self, request_id: str, reason: str) -> None:
        held = self._holding.get(request_id)
        if held is None:
            return
        request, reasons = held
        reasons.discard(reason)
        if not reasons:
            del self._holding[request_id]
            self._kv.free(request)

    def _give_up(self, request_id: str) -> None:
        """Go on without a load whose blocks may still be written: they stay with nobody."""
        request = self._loading.get(request_id)
        if request is None:
            return
        if not self._recompute_failed:
            self._fail(request)
            return
        del self._loading[request_id]
        self._arrived_bad.discard(request_id)
        aside = f"{request_id} (given up)"
        self._kv.set_aside(request_id, aside)
        self._quarantined[request_id] = aside
        self._compute_instead(request)

    def _compute_instead(self, request: Request) -> None:
        request.num_computed_tokens = 0
        request.num_cached_tokens = -1
        request.kv_capacity = 0
        self._load_nothing.add(request.request_id)
        request.status = RequestStatus.WAITING
        self._scheduler.waiting.prepend_request(request)

    def _end_load(self, request_id: str, failed: bool) -> None:
        aside = self._quarantined.pop(request_id, None)
        if aside is not None:
            self._kv.free_row(aside)
            return
        request = self._loading.get(request_id)
        if request is None:
            self._stop_holding(request_id, _RECEIVE)
            return
        failed = failed or request_id in self._arrived_bad
        self._arrived_bad.discard(request_id)
        if failed and not self._recompute_failed:
            self._fail(request)
            self._stop_holding(request_id, _RECEIVE)
            return
        del self._loading[request_id]
        if failed:
            self._kv.free(request)
            self._compute_instead(request)
            return
        self._kv.cache_blocks(request, request.num_computed_tokens)
        # The last token is computed here, for its logits.
        request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        request.status = RequestStatus.WAITING
        self._scheduler.waiting.prepend_request(request)

    def _fail(self, request: Request) -> None:
        self._scheduler.fail_request(
            request,
            "the KV cache of this request could not be loaded; with kv_load_failure_policy "
            '"recompute" in --kv-transfer-config it would have been computed',
            "KVTransferError",
        )

    # Failures

    def handle_failures(self, output: KVConnectorOutput) -> frozenset[str] | set[str]:
        """Deal with blocks that hold something else than they should.

        Every request that has such a block is affected, and so is everything it has computed
        from the block on, in this step or earlier, and whoever shares that. Running requests
        are recomputed or fail, as the policy says; loading ones when their load has ended.

        Returns:
            The requests whose samples of this step mean nothing.
        """
        bad = set(output.invalid_block_ids)
        if not bad:
            return frozenset()
        affected: dict[str, Request] = {}
        candidates = [*self._scheduler.running, *self._loading.values()]
        grew = True
        while grew:
            grew = False
            for request in candidates:
                tainted = self._blocks_from_first_bad(request, bad)
                if tainted:
                    affected[request.request_id] = request
                    grew = grew or not tainted <= bad
                    bad |= tainted
        self._kv.evict_blocks(bad)
        for request_id, request in affected.items():
            if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
                self._arrived_bad.add(request_id)
            elif self._recompute_failed:
                self._load_nothing.add(request_id)
                # Its good blocks can be found again by hash; the bad ones must not be.
                self._scheduler.preempt(request, cache=False)
            else:
                self._fail(request)
        return affected.keys() - self._loading.keys()

    def _blocks_from_first_bad(self, request: Request, bad: set[int]) -> set[int]:
        """Block ids of ``request``, in every group, from its first bad token on."""
        first_token = None
        managers = self._kv.managers
        for manager in managers:
            for index, block in enumerate(manager.req_to_blocks.get(request.request_id, ())):
                if block.block_id in bad:
                    token = index * manager.block_size
                    first_token = token if first_token is None else min(first_token, token)
                    break
        if first_token is None:
            return set()
        return {
            block.block_id
            for manager in managers
            for block in manager.req_to_blocks.get(request.request_id, ())[
                first_token // manager.block_size :
            ]
            if not block.is_null
        }


def _unshared(blocks: KVCacheBlocks) -> set[int]:
    """Ids of the blocks that were not found in the prefix cache."""
    return {
        block.block_id
        for row in blocks.blocks
        for block in row
        if not block.is_null and block.ref_cnt == 1
    }
