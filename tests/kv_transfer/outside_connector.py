"""A connector as another package would have it: only vLLM's public names are imported.

Keeps every prompt's full blocks in a dict, layer by layer, and gives them back.
"""

import threading
from dataclasses import dataclass, field

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

STORE: dict = {}
CALLS: list[str] = []
LOCK = threading.Lock()


@dataclass
class Meta(KVConnectorMetadata):
    loads: list = field(default_factory=list)
    saves: list = field(default_factory=list)


class OutsideConnector(KVConnectorBase_V1):
    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.block = vllm_config.cache_config.block_size
        self.shift = self._kv_transfer_config.get_from_extra_config("shift", 0)
        self.pending = []

    def full(self, tokens):
        return (len(tokens) - 1) // self.block

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        blocks = self.full(request.prompt_token_ids)
        key = tuple(request.prompt_token_ids[: blocks * self.block])
        if key not in STORE:
            return 0, False
        return max(0, blocks * self.block - num_computed_tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            count = self.full(request.prompt_token_ids)
            key = tuple(request.prompt_token_ids[: count * self.block])
            self.pending.append((key, blocks.get_block_ids()[0][:count]))

    def build_connector_meta(self, scheduler_output: SchedulerOutput):
        meta = Meta(self.pending)
        self.pending = []
        for new in scheduler_output.scheduled_new_reqs:
            count = self.full(new.prompt_token_ids)
            key = tuple(new.prompt_token_ids[: count * self.block])
            if key not in STORE:
                meta.saves.append((key, new.block_ids[0][:count]))
        return meta

    def register_kv_caches(self, kv_caches):
        self.kv_caches = kv_caches

    def start_load_kv(self, forward_context, **kwargs):
        CALLS.append("start_load_kv")

    def wait_for_layer_load(self, layer_name):
        CALLS.append(f"wait {layer_name}")
        for key, blocks in self._get_connector_metadata().loads:
            self.kv_caches[layer_name][blocks] = STORE[key][layer_name] + self.shift

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        CALLS.append(f"save {layer_name}")
        for key, blocks in self._get_connector_metadata().saves:
            STORE.setdefault(key, {})[layer_name] = kv_layer[blocks].clone()

    def wait_for_save(self):
        CALLS.append("wait_for_save")
