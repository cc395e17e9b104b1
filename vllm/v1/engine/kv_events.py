"""Takes the scheduler's KV events after each step and publishes them as a batch.

Fills in what the block pool does not know: the kind of each group's cache, and hashes in the form
that subscribers expect.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent, KVEventBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_event_publisher import EventPublisher
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["KVEventSource", "NullKVEventSource", "make_kv_events"]

_MASK = (1 << 64) - 1


class NullKVEventSource:
    """KV events are not enabled."""

    def publish(self, scheduler: SchedulerInterface) -> None:
        """Send what has happened since the last call."""
        # Nobody listens; what a connector has collected must not pile up.
        scheduler.take_events()

    def shutdown(self) -> None:
        """Send what is queued, then close."""


class KVEventSource(NullKVEventSource):
    def __init__(self, publisher: EventPublisher, kv_cache_config: KVCacheConfig) -> None:
        self._publisher = publisher
        specs = [group.kv_cache_spec.manager_spec for group in kv_cache_config.kv_cache_groups]
        self._kinds = [str(spec.kind.value) for spec in specs]
        self._windows = [getattr(spec, "sliding_window", None) for spec in specs]
        self._as_numbers = envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES

    def publish(self, scheduler: SchedulerInterface) -> None:
        events = scheduler.take_events()
        if events:
            batch = KVEventBatch(ts=time.time(), events=[self._complete(e) for e in events])
            self._publisher.publish(batch)

    def _complete(self, event: KVCacheEvent) -> Any:
        if isinstance(event, BlockStored):
            event.block_hashes = [self._hash(value) for value in event.block_hashes]
            if event.parent_block_hash is not None:
                event.parent_block_hash = self._hash(event.parent_block_hash)
            if event.group_idx is not None and event.kv_cache_spec_kind is None:
                event.kv_cache_spec_kind = self._kinds[event.group_idx]
                event.kv_cache_spec_sliding_window = self._windows[event.group_idx]
        elif isinstance(event, BlockRemoved):
            event.block_hashes = [self._hash(value) for value in event.block_hashes]
        return event

    def _hash(self, value: bytes | int) -> bytes | int:
        if self._as_numbers and isinstance(value, bytes):
            return int.from_bytes(value, "big") & _MASK
        return value

    def shutdown(self) -> None:
        self._publisher.shutdown()


def make_kv_events(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> NullKVEventSource:
    """The source that ``--kv-events-config`` asks for."""
    config = vllm_config.kv_events_config
    if config is None or not config.enable_kv_cache_events:
        return NullKVEventSource()
    from vllm.distributed.kv_event_publisher import make_publisher

    return KVEventSource(make_publisher(config), kv_cache_config)
