"""Keeps blocks in host memory, then in files, and brings them back by hash.

The scheduler half owns which hash lies in which host slot; the worker half copies byte runs
between blocks and slots, as the descriptor says, whatever layout or format. Blocks are copied out
in the step that fills them and copied in before the step that reads them, so nothing is ever half
there. What has to leave host memory goes to a file, if there is a file tier; before a request is
admitted, what it needs of files is brought to host memory, so a bad file is a miss and no failure.
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
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import refuse_scales_of_a_run
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_files import (
    TRAILER_BYTES,
    BlockFiles,
    FileIndex,
    FileReport,
    rank_folder,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
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
    """``kv_connector_extra_config`` of an OffloadingConnector; one of the first two is needed."""

    cpu_bytes_to_use: float | None = None
    """Bytes of host memory, of all ranks together."""
    num_cpu_blocks: int | None = None
    file_path: str | None = None
    """A folder for what host memory has no room for."""
    file_bytes_to_use: float | None = None
    """Bytes of files, of all ranks together."""


class HostSlots:
    """Which block hash lies in which of ``num_slots`` slots, by use."""

    def __init__(self, num_slots: int) -> None:
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(num_slots))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    @property
    def is_full(self) -> bool:
        """Another block takes the place of one."""
        return not self._free

    def use(self, block_hash: bytes) -> int:
        """The slot of a hash that is there, which becomes the last to go."""
        self._slots.move_to_end(block_hash)
        return self._slots[block_hash]

    def put(self, block_hash: bytes) -> tuple[int, bytes | None]:
        """A slot for a hash that is not there, and the hash that had to go for it."""
        assert block_hash not in self._slots
        slot, evicted = self.reserve()
        self._slots[block_hash] = slot
        return slot, evicted

    def reserve(self) -> tuple[int, bytes | None]:
        """A slot that nobody finds, and the hash that had to go for it."""
        if self._free:
            return self._free.pop(), None
        evicted, slot = self._slots.popitem(last=False)
        return slot, evicted

    def fill(self, slot: int, block_hash: bytes) -> None:
        """A reserved slot holds a block now."""
        if block_hash in self._slots:
            self._free.append(slot)
        else:
            self._slots[block_hash] = slot

    def give_back(self, slot: int) -> None:
        """A reserved slot is not needed."""
        self._free.append(slot)

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
    spill_slots: list[int] = field(default_factory=list)
    """Slots to be written to files before anything else."""
    spill_hashes: list[bytes] = field(default_factory=list)
    fetch_slots: list[int] = field(default_factory=list)
    """Slots to be filled from files, after that."""
    fetch_hashes: list[bytes] = field(default_factory=list)
    unwanted_files: list[bytes] = field(default_factory=list)


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
        num_files = _num_files(settings, kv_cache_config, world_size)
        self._file_path = settings.file_path
        if settings.file_path is not None:
            refuse_scales_of_a_run(vllm_config, "OffloadingConnector's file_path")
        self._files: BlockFiles | None = None
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
            self._next = OffloadingMetadata()
            self._index: FileIndex | None = None
            if settings.file_path is not None:
                folder = rank_folder(settings.file_path, vllm_config, kv_cache_config, 0)
                self._index = FileIndex(num_files, folder)
            self._fetching: dict[bytes, int] = {}
            self._fresh: set[int] = set()
            """Slots that are stored to in the step that is being made."""
            self._outdated: set[bytes] = set()
            """Of those being fetched, what a reset has made void."""
            self._fetched_for: set[str] = set()
            """Requests for which files have been looked at: once is enough."""

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
        if self._index is not None and self._waits_for_files(request, hashes, first, found):
            return None, False
        self._first_found[request.request_id] = first
        return max(0, (found - first) * self._block_size), False

    def _waits_for_files(
        self, request: Request, hashes: list[bytes], first: int, found: int
    ) -> bool:
        """Whether more than the ``found`` blocks will be in host memory soon.

        What can be had is fetched once for a request; it then takes what there is.
        """
        if self._fetching and any(one in self._fetching for one in hashes[found:]):
            return True
        if found >= len(hashes) or request.request_id in self._fetched_for:
            return False
        self._fetched_for.add(request.request_id)
        assert self._index is not None
        for block_hash in hashes[first:found]:
            self._slots.use(block_hash)
        # What is found, and what this step loads, was used last: it is not evicted for this.
        room = self.num_slots - (found - first) - len(self._fetching) - len(self._loads)
        fetches = len(self._next.fetch_slots)
        for block_hash in hashes[found : found + max(0, room)]:
            if block_hash in self._slots:
                self._slots.use(block_hash)
                continue
            if block_hash not in self._index:
                break
            self._index.use(block_hash)
            slot, evicted = self._slots.reserve()
            self._spill(slot, evicted)
            self._fetching[block_hash] = slot
            self._next.fetch_slots.append(slot)
            self._next.fetch_hashes.append(block_hash)
        return len(self._next.fetch_slots) > fetches

    def _spill(self, slot: int, evicted: bytes | None) -> None:
        """``evicted`` loses its slot: it goes to a file, unless it has one."""
        if evicted is None:
            return
        self._events.append(BlockRemoved([evicted], medium=MEDIUM_CPU))
        if self._index is None or slot in self._fresh:
            # What this step stores is not there yet when it writes files.
            return
        if evicted in self._index:
            self._index.use(evicted)
            return
        self._index.add(evicted)
        self._next.spill_slots.append(slot)
        self._next.spill_hashes.append(evicted)

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
        metadata, self._next = self._next, OffloadingMetadata()
        loads, self._loads = self._loads, []
        for slot, blocks in loads:
            metadata.load_slots.append(slot)
            metadata.load_blocks.append(blocks)
        in_use = {slot for slot, _ in loads}
        self._fresh = set()
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            self._store(request, request.num_computed_tokens + count, in_use, metadata)
        # Storing has spilt, too: that belongs to this step.
        metadata.spill_slots += self._next.spill_slots
        metadata.spill_hashes += self._next.spill_hashes
        self._next = OffloadingMetadata()
        self._fresh = set()
        if self._index is not None:
            metadata.unwanted_files = self._index.take_unwanted()
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
            if self._slots.is_full and len(in_use) >= len(self._slots):
                break
            slot, evicted = self._slots.put(hashes[index])
            in_use.add(slot)
            self._spill(slot, evicted)
            self._fresh.add(slot)
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
        self._fetched_for.discard(request.request_id)
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
        if self._index is not None:
            self._index.clear()
            self._outdated |= self._fetching.keys()
        self._events.append(AllBlocksCleared())
        return True

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Copies are part of the step; only files may fail."""
        report = connector_output.kv_connector_worker_meta
        if not isinstance(report, FileReport):
            return
        assert self._index is not None
        for block_hash in report.not_written | report.not_fetched:
            self._index.drop(block_hash)
        for block_hash in report.not_fetched:
            self._slots.give_back(self._fetching.pop(block_hash))
        for block_hash in report.fetched:
            slot = self._fetching.pop(block_hash)
            if block_hash in self._outdated:
                self._slots.give_back(slot)
            else:
                self._slots.fill(slot, block_hash)
        self._outdated &= self._fetching.keys()

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading_copies import HostBlocks

        assert self._kv_cache_config is not None
        trailer = 0 if self._file_path is None else TRAILER_BYTES
        self._host = HostBlocks(self._kv_cache_config, kv_caches, self.num_slots, trailer)
        self._report: FileReport | None = None
        if self._file_path is not None:
            folder = rank_folder(
                self._file_path,
                self._vllm_config,
                self._kv_cache_config,
                get_tensor_model_parallel_rank(),
            )
            if self._files is not None:
                self._files.close()
            self._files = BlockFiles(folder, self._host.slots)
        logger.info(
            "Offloading: %d blocks of host memory, %s",
            self.num_slots,
            format_bytes(self._host.size_bytes),
        )

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, OffloadingMetadata)
        if self._files is not None:
            self._move_files(self._files, metadata)
        self._host.load(metadata.load_slots, metadata.load_blocks)

    def _move_files(self, files: BlockFiles, metadata: OffloadingMetadata) -> None:
        """Slots to files, files to slots, and then what no longer counts."""
        report = FileReport()
        if metadata.spill_slots:
            report.not_written = files.write(metadata.spill_slots, metadata.spill_hashes)
            num_failed = len(report.not_written)
            self._host.count_files("store", len(metadata.spill_slots) - num_failed, num_failed)
        if metadata.fetch_slots:
            report.not_fetched = files.read(metadata.fetch_slots, metadata.fetch_hashes)
            report.fetched = set(metadata.fetch_hashes) - report.not_fetched
            self._host.count_files("load", len(report.fetched), len(report.not_fetched))
        files.delete(metadata.unwanted_files)
        if report.fetched or report.not_fetched or report.not_written:
            self._report = report

    def build_connector_worker_meta(self) -> FileReport | None:
        report, self._report = self._report, None
        return report

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

    def shutdown(self) -> None:
        if self._files is not None:
            self._files.close()
            self._files = None


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


def _num_files(settings: OffloadingSettings, config: KVCacheConfig, world_size: int) -> int:
    """Files of one rank; 0 without a file tier."""
    if (settings.file_path is None) != (settings.file_bytes_to_use is None):
        raise ConfigError(
            "OffloadingConnector needs file_path and file_bytes_to_use together, or neither",
            parameter="kv_connector_extra_config",
        )
    if settings.file_bytes_to_use is None:
        return 0
    block = config.bytes_per_block * len(config.kv_cache_groups) + TRAILER_BYTES
    num_files = math.floor(settings.file_bytes_to_use / world_size / block)
    if num_files < 1:
        raise CapacityError(
            f"OffloadingConnector: the file of one block takes {format_bytes(block)} on each rank: "
            "raise file_bytes_to_use"
        )
    return num_files


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
