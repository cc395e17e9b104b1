"""Keeps blocks in host memory, least recently used first out, and brings them back by hash.

The scheduler half owns which hash lies in which host slot; the worker half copies byte runs
between blocks and slots, as the descriptor says, whatever layout or format. Blocks are copied out
in the step that fills them and copied in before the step that reads them, so nothing is ever half
there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.errors import CapacityError, ConfigError
from vllm.logger import init_logger
from vllm.utils.system import format_bytes
from vllm.v1.core.kv_cache_utils import group_block_hashes, resolve_hash_block_size

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["HostSlots", "OffloadingConnector"]

logger = init_logger(__name__)

MEDIUM_CPU = "CPU"


class OffloadingSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config`` of an OffloadingConnector; one of the two is needed."""

    cpu_bytes_to_use: float | None = None
    """Bytes of host memory, of all ranks together."""
    num_cpu_blocks: int | None = None


class HostSlots:
    """Which block hash lies in which of ``num_slots`` slots, by use."""

    def __init__(self, num_slots: int) -> None:
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(num_slots))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    def use(self, block_hash: bytes) -> int:
        """The slot of a hash that is there, which becomes the last to go."""
        self._slots.move_to_end(block_hash)
        return self._slots[block_hash]

    def put(self, block_hash: bytes) -> tuple[int, bytes | None]:
        """A slot for a hash that is not there, and the hash that had to go for it."""
        assert block_hash not in self._slots
        evicted = None
        if self._free:
            slot = self._free.pop()
        else:
            evicted, slot = self._slots.popitem(last=False)
        self._slots[block_hash] = slot
        return slot, evicted

    def clear(self) -> None:
        self._free.extend(self._slots.values())
        self._slots.clear()


@dataclass(slots=True)
class OffloadingMetadata(KVConnectorMetadata):
    """Copies of a step, as parallel lists of block ids per group and host slots."""

    load_slots: list[int] = field(default_factory=list)
    load_blocks: list[tuple[int, ...]] = field(default_factory=list)
    store_slots: list[int] = field(default_factory=list)
    store_blocks: list[tuple[int, ...]] = field(default_factory=list)


class OffloadingConnector(KVConnectorBase_V1, SupportsHMA):
    """Every full block of every request is kept in host memory too, as long as there is room.

    Raises:
        ConfigError: the settings cannot work, prefix caching is off, or the model's cache groups
            do not keep all tokens in blocks of one size.
        CapacityError: the host memory holds not one block.
    """

    works_between_layers = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert kv_cache_config is not None
        assert self._kv_transfer_config is not None
        if not vllm_config.cache_config.enable_prefix_caching:
            raise ConfigError(
                "OffloadingConnector finds blocks by their hashes: drop --no-enable-prefix-caching",
                parameter="enable_prefix_caching",
            )
        try:
            settings = msgspec.convert(
                self._kv_transfer_config.kv_connector_extra_config, OffloadingSettings
            )
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"OffloadingConnector: kv_connector_extra_config: {error}",
                parameter="kv_connector_extra_config",
            ) from None
        self._block_size = _common_block_size(kv_cache_config)
        world_size = vllm_config.parallel_config.world_size
        self.num_slots = _num_slots(settings, kv_cache_config, world_size)
        if role is KVConnectorRole.SCHEDULER:
            hash_block_size = resolve_hash_block_size(kv_cache_config, default=self._block_size)
            self._hashes_per_block = self._block_size // hash_block_size
            self._slots = HostSlots(self.num_slots)
            self._requests: dict[str, Request] = {}
            self._stored: dict[str, int] = {}
            self._first_found: dict[str, int] = {}
            self._loads: list[tuple[int, tuple[int, ...]]] = []
            self._manager: Any = None
            self._events: list[KVCacheEvent] = []

    # Scheduler half

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._manager = kv_cache_manager

    def _hashes(self, request: Request) -> list[bytes]:
        return list(group_block_hashes(request.block_hashes, self._hashes_per_block))

    def on_new_request(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if request.skip_reading_prefix_cache:
            return 0, False
        first = found = num_computed_tokens // self._block_size
        hashes = self._hashes(request)[: (request.num_tokens - 1) // self._block_size]
        while found < len(hashes) and hashes[found] in self._slots:
            found += 1
        self._first_found[request.request_id] = first
        return max(0, (found - first) * self._block_size), False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if num_external_tokens == 0:
            return
        rows = blocks.get_block_ids()
        first = self._first_found.pop(request.request_id)
        hashes = self._hashes(request)
        for index in range(first, first + num_external_tokens // self._block_size):
            slot = self._slots.use(hashes[index])
            self._loads.append((slot, tuple(row[index] for row in rows)))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> OffloadingMetadata:
        metadata = OffloadingMetadata()
        loads, self._loads = self._loads, []
        for slot, blocks in loads:
            metadata.load_slots.append(slot)
            metadata.load_blocks.append(blocks)
        in_use = {slot for slot, _ in loads}
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            self._store(request, request.num_computed_tokens + count, in_use, metadata)
        return metadata

    def _store(
        self, request: Request, num_computed: int, in_use: set[int], metadata: OffloadingMetadata
    ) -> None:
        """Copy out the blocks that this step fills, once each."""
        start = self._stored.get(request.request_id, 0)
        end = min(num_computed, request.num_tokens) // self._block_size
        if end <= start:
            return
        self._stored[request.request_id] = end
        hashes = self._hashes(request)
        rows = self._manager.get_block_ids(request.request_id)
        fresh = []
        for index in range(start, min(end, len(hashes))):
            if hashes[index] in self._slots:
                self._slots.use(hashes[index])
                continue
            if len(self._slots) == self.num_slots and len(in_use) >= self.num_slots:
                break
            slot, evicted = self._slots.put(hashes[index])
            in_use.add(slot)
            if evicted is not None:
                self._events.append(BlockRemoved([evicted], medium=MEDIUM_CPU))
            metadata.store_slots.append(slot)
            metadata.store_blocks.append(tuple(row[index] for row in rows))
            fresh.append(index)
        size = self._block_size
        self._events.extend(
            BlockStored(
                block_hashes=[hashes[index]],
                parent_block_hash=hashes[index - 1] if index else None,
                token_ids=request.all_token_ids[index * size : (index + 1) * size],
                block_size=size,
                medium=MEDIUM_CPU,
            )
            for index in fresh
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        self._stored.pop(request.request_id, None)
        self._first_found.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def take_events(self) -> Iterable[KVCacheEvent]:
        events, self._events = self._events, []
        return events

    def reset_cache(self) -> bool | None:
        self._slots.clear()
        self._stored.clear()
        self._events.append(AllBlocksCleared())
        return True

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Copies are part of the step, so there is nothing to hear of."""

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading_copies import HostBlocks

        assert self._kv_cache_config is not None
        self._host = HostBlocks(self._kv_cache_config, kv_caches, self.num_slots)
        logger.info(
            "Offloading: %d blocks of host memory, %s",
            self.num_slots,
            format_bytes(self._host.size_bytes),
        )

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, OffloadingMetadata)
        self._host.load(metadata.load_slots, metadata.load_blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are issued before the forward pass, in its own order."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Whole blocks are copied after the forward pass."""

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, OffloadingMetadata)
        self._host.store(metadata.store_slots, metadata.store_blocks)

    def get_kv_connector_stats(self) -> dict[str, Any] | None:
        return self._host.take_stats()


def _common_block_size(config: KVCacheConfig) -> int:
    specs = [group.kv_cache_spec.manager_spec for group in config.kv_cache_groups]
    sizes = {spec.block_size for spec in specs}
    kept = all(spec.kind.value in ("full_attention", "mla_attention") for spec in specs)
    if len(sizes) != 1 or not kept:
        kinds = ", ".join(f"{spec.kind.value} of {spec.block_size}" for spec in specs)
        raise ConfigError(
            f"OffloadingConnector keeps prefixes of layers that keep every token, in blocks of one "
            f"size; this model's cache groups are {kinds}: set "
            "--disable-hybrid-kv-cache-manager if it has windows only",
            parameter="kv_connector",
        )
    return sizes.pop()


def _num_slots(settings: OffloadingSettings, config: KVCacheConfig, world_size: int) -> int:
    if settings.num_cpu_blocks is not None:
        num_slots = settings.num_cpu_blocks
    elif settings.cpu_bytes_to_use is not None:
        block = config.bytes_per_block * len(config.kv_cache_groups)
        num_slots = math.floor(settings.cpu_bytes_to_use / world_size / block)
    else:
        raise ConfigError(
            'OffloadingConnector needs kv_connector_extra_config {"cpu_bytes_to_use": BYTES} or '
            '{"num_cpu_blocks": N}',
            parameter="kv_connector_extra_config",
        )
    if num_slots < 1:
        raise CapacityError(
            f"OffloadingConnector: one block takes {format_bytes(config.bytes_per_block)} of host "
            "memory on each rank: raise cpu_bytes_to_use"
        )
    return num_slots
