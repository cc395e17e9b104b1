"""Several connectors as one: the first that can load a request does, all that want to save do.

Metadata, statistics and worker reports of the parts travel in tuples, in the order of the
configuration. A request's blocks stay until every part that asked for them has let go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    CopyBlocksOp,
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.movement import part_configs
from vllm.v1.outputs import KVConnectorOutput

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["MultiConnector"]


@dataclass(slots=True)
class MultiKVConnectorMetadata(KVConnectorMetadata):
    parts: tuple[KVConnectorMetadata, ...]


@dataclass(slots=True)
class MultiKVConnectorHandshake(KVConnectorHandshakeMetadata):
    parts: tuple[KVConnectorHandshakeMetadata | None, ...]


@dataclass(slots=True)
class MultiKVConnectorWorkerMetadata(KVConnectorWorkerMetadata):
    parts: tuple[KVConnectorWorkerMetadata | None, ...]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> MultiKVConnectorWorkerMetadata:
        assert isinstance(other, MultiKVConnectorWorkerMetadata)
        pairs = zip(self.parts, other.parts, strict=True)
        return MultiKVConnectorWorkerMetadata(
            tuple(a.aggregate(b) if a and b else a or b for a, b in pairs)
        )


class MultiConnector(KVConnectorBase_V1, SupportsHMA):
    """``kv_connector_extra_config``: ``connectors``, a list of configurations.

    Raises:
        ConfigError: a part's configuration cannot work, or the parts need different layouts.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert self._kv_transfer_config is not None
        self._parts = [
            KVConnectorFactory.create_connector(
                dataclasses.replace(vllm_config, kv_transfer_config=config), role, kv_cache_config
            )
            for config in part_configs(self._kv_transfer_config)
        ]
        self.works_between_layers = any(part.works_between_layers for part in self._parts)
        self._loads_by: dict[str, int] = {}
        """Request id -> the part that loads it."""
        self._sends_left: dict[str, int] = {}
        """Request id -> parts that still hold its blocks."""

    # Both halves

    def shutdown(self) -> None:
        for part in self._parts:
            part.shutdown()

    @property
    def requires_kv_delivery(self) -> bool:
        return any(part.requires_kv_delivery for part in self._parts)

    # Worker half

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, MultiKVConnectorMetadata)
        for part, metadata in zip(self._parts, connector_metadata.parts, strict=True):
            part.bind_connector_metadata(metadata)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        for part in self._parts:
            part.clear_connector_metadata()

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        for part in self._parts:
            part.register_transfer_callback(callback)

    def register_kv_scales(self, scales: dict[str, tuple[float, float]]) -> None:
        for part in self._parts:
            part.register_kv_scales(scales)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        for part in self._parts:
            part.register_kv_caches(kv_caches)

    def unregister_kv_caches(self) -> None:
        for part in self._parts:
            part.unregister_kv_caches()

    def restore_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        for part in self._parts:
            part.restore_kv_caches(kv_caches)

    def set_host_xfer_buffer_ops(self, copy_operation: CopyBlocksOp) -> None:
        for part in self._parts:
            part.set_host_xfer_buffer_ops(copy_operation)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        parts = tuple(part.get_handshake_metadata() for part in self._parts)
        return MultiKVConnectorHandshake(parts) if any(parts) else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, MultiKVConnectorMetadata)
        for part, metadata in zip(self._parts, kv_connector_metadata.parts, strict=True):
            part.handle_preemptions(metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        for part in self._parts:
            part.start_load_kv(forward_context, **kwargs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        for part in self._parts:
            part.wait_for_layer_load(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        for part in self._parts:
            part.save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)

    def wait_for_save(self) -> None:
        for part in self._parts:
            part.wait_for_save()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Receiving ends when the one part that loads says so; sending is reported by part,
        ``"part:request"``, and counted by the scheduler half.
        """
        total = KVConnectorTransferResults(set(), set(), set(), set())
        assert total.finished_sending is not None
        assert total.finished_recving is not None
        assert total.failed_recving is not None
        assert total.stuck_recving is not None
        for index, part in enumerate(self._parts):
            results = part.get_transfer_results(finished_req_ids)
            total.finished_sending |= {f"{index}:{r}" for r in results.finished_sending or ()}
            total.finished_recving |= results.finished_recving or set()
            total.failed_recving |= results.failed_recving or set()
            total.stuck_recving |= results.stuck_recving or set()
        return total

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set().union(*(part.get_block_ids_with_load_errors() for part in self._parts))

    def get_kv_connector_stats(self) -> dict[str, Any] | None:
        total: dict[str, Any] = {}
        for part in self._parts:
            for name, value in (part.get_kv_connector_stats() or {}).items():
                total[name] = total.get(name, 0) + value
        return total or None

    def get_kv_connector_kv_cache_events(self) -> list[Any] | None:
        parts = [part.get_kv_connector_kv_cache_events() for part in self._parts]
        return parts if any(parts) else None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        parts = tuple(part.build_connector_worker_meta() for part in self._parts)
        return MultiKVConnectorWorkerMetadata(parts) if any(parts) else None

    # Scheduler half

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        for part in self._parts:
            part.bind_kv_cache_manager(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        for part in self._parts:
            part.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        for index, part in enumerate(self._parts):
            found, load_async = part.get_num_new_matched_tokens(request, num_computed_tokens)
            if found is None:
                return None, False
            if found:
                self._loads_by[request.request_id] = index
                return found, load_async
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        chosen = self._loads_by.get(request.request_id)
        for index, part in enumerate(self._parts):
            part.update_state_after_alloc(
                request, blocks, num_external_tokens if index == chosen else 0
            )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return MultiKVConnectorMetadata(
            tuple(part.build_connector_meta(scheduler_output) for part in self._parts)
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Give each part its share; ``finished_sending`` becomes what all parts are done with."""
        sent = connector_output.finished_sending or set()
        by_part: list[set[str]] = [set() for _ in self._parts]
        for name in sent:
            number, _, request_id = name.partition(":")
            by_part[int(number)].add(request_id)
            self._sends_left[request_id] = self._sends_left.get(request_id, 0) - 1
        ended = {r for r in set().union(*by_part) if self._sends_left[r] == 0}
        for request_id in ended:
            del self._sends_left[request_id]
        metas: Any = connector_output.kv_connector_worker_meta
        events: Any = connector_output.kv_cache_events
        for index, part in enumerate(self._parts):
            mine = {r for r in connector_output.finished_recving or () if self._loads(r, index)}
            failed = {r for r in connector_output.failed_recving if self._loads(r, index)}
            part.update_connector_output(
                dataclasses.replace(
                    connector_output,
                    finished_sending=by_part[index] or None,
                    finished_recving=mine or None,
                    failed_recving=failed,
                    kv_connector_worker_meta=metas.parts[index] if metas is not None else None,
                    kv_cache_events=events[index] if events is not None else None,
                )
            )
        connector_output.finished_sending = ended or None

    def _loads(self, request_id: str, index: int) -> bool:
        return self._loads_by.get(request_id) == index

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        must_stay, params = 0, None
        for part in self._parts:
            if isinstance(part, SupportsHMA):
                stays, own = part.request_finished_all_groups(request, block_ids)
            else:
                stays, own = part.request_finished(request, block_ids[0])
            must_stay += stays
            params = params or own
        self._loads_by.pop(request.request_id, None)
        left = self._sends_left.pop(request.request_id, 0) + must_stay
        if left:
            self._sends_left[request.request_id] = left
        return left > 0, params

    def take_events(self) -> Iterable[KVCacheEvent]:
        return [event for part in self._parts for event in part.take_events()]

    def get_finished_count(self) -> int | None:
        counts = [part.get_finished_count() for part in self._parts]
        known = {count for count in counts if count is not None}
        assert len(known) <= 1, f"parts count different numbers of ranks: {counts}"
        return known.pop() if known else None

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        for index, part in enumerate(self._parts):
            own = {}
            for rank, whole in metadata.items():
                assert isinstance(whole, MultiKVConnectorHandshake)
                if (item := whole.parts[index]) is not None:
                    own[rank] = item
            if own:
                part.set_xfer_handshake_metadata_pp_aware(own)

    def has_pending_push_work(self) -> bool:
        return any(part.has_pending_push_work() for part in self._parts)

    def reset_cache(self) -> bool | None:
        answers = [part.reset_cache() for part in self._parts]
        done = [answer for answer in answers if answer is not None]
        return all(done) if done else None
