"""Keeps prompts as files, asynchronously both ways, by vLLM's public names only.

A prompt is saved when its request has ended: its blocks stay until a thread has written them. It is
loaded by the same thread while the request waits.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.forward_context import ForwardContext
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

logger = init_logger(__name__)


@dataclass
class PromptStoreMetadata(KVConnectorMetadata):
    loads: list[tuple[str, str, list[int], int]] = field(default_factory=list)
    """Request, file, blocks, and how many blocks of the file come before them."""
    saves: list[tuple[str, str, list[int]]] = field(default_factory=list)


class PromptStore(KVConnectorBase_V1):
    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.folder = Path(vllm_config.kv_transfer_config.get_from_extra_config("folder", "."))
        self.block_size = vllm_config.cache_config.block_size
        self.next = PromptStoreMetadata()
        self.found: dict[str, int] = {}
        self.saving: set[str] = set()
        self.lock = threading.Lock()
        self.saved: set[str] = set()
        self.loaded: set[str] = set()
        self.pool = ThreadPoolExecutor(1)

    def file_of(self, request: Request) -> tuple[str, int]:
        """The file of a prompt, and its full blocks, leaving a token to compute."""
        tokens = request.prompt_token_ids
        count = (len(tokens) - 1) // self.block_size
        text = repr(tokens[: count * self.block_size])
        return hashlib.sha256(text.encode()).hexdigest() + ".pt", count

    # Scheduler half

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        name, count = self.file_of(request)
        missing = count * self.block_size - num_computed_tokens
        if missing <= 0 or not (self.folder / name).exists():
            return 0, False
        self.found[request.request_id] = num_computed_tokens // self.block_size
        return missing, True

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if num_external_tokens:
            first = self.found.pop(request.request_id)
            name, count = self.file_of(request)
            row = blocks.get_block_ids()[0][first:count]
            self.next.loads.append((request.request_id, name, row, first))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        metadata, self.next = self.next, PromptStoreMetadata()
        return metadata

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        name, count = self.file_of(request)
        if count == 0 or len(block_ids) < count or (self.folder / name).exists():
            return False, None
        self.next.saves.append((request.request_id, name, block_ids[:count]))
        self.saving.add(request.request_id)
        return True, {"stored_as": name}

    def update_connector_output(self, connector_output: Any) -> None:
        self.saving -= connector_output.finished_sending or set()

    def has_pending_push_work(self) -> bool:
        return bool(self.saving)

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        for load in metadata.loads:
            self.pool.submit(self.load, *load)
        for save in metadata.saves:
            self.pool.submit(self.save, *save)

    def load(self, request_id: str, name: str, blocks: list[int], first: int) -> None:
        stored = torch.load(self.folder / name, weights_only=True)
        for layer, cache in self.kv_caches.items():
            cache[blocks] = stored[layer][first : first + len(blocks)].to(cache.device)
        with self.lock:
            self.loaded.add(request_id)

    def save(self, request_id: str, name: str, blocks: list[int]) -> None:
        part = self.folder / f"{name}.part"
        torch.save({name: kv[blocks].cpu() for name, kv in self.kv_caches.items()}, part)
        part.rename(self.folder / name)
        logger.info("stored %s", name)
        with self.lock:
            self.saved.add(request_id)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        with self.lock:
            done = self.saved, self.loaded
            self.saved, self.loaded = set(), set()
        return done

    def shutdown(self) -> None:
        self.pool.shutdown()
