"""A connector to read first: keeps the KV of whole prompts as safetensors files in a folder.

One folder a prompt, named by the hash of its tokens; in it one file a layer, the states of the
prompt's full blocks as ``(blocks, H, N, C)``. Loads and saves happen inside the step (nothing is
asynchronous), so there is no bookkeeping beyond the step. Works with one cache group, in any
layout, because it only indexes views by block.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import refuse_scales_of_a_run
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.errors import ConfigError
from vllm.logger import init_logger

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["ExampleConnector"]

logger = init_logger(__name__)

_COMPLETE = "complete"
"""A folder without this file is still being written, or its writer died."""


@dataclass(slots=True)
class _Blocks:
    folder: str
    block_ids: list[int]
    first: int = 0
    """Of the stored blocks, the one that ``block_ids[0]`` holds."""


@dataclass(slots=True)
class ExampleConnectorMetadata(KVConnectorMetadata):
    loads: list[_Blocks] = field(default_factory=list)
    saves: list[_Blocks] = field(default_factory=list)


class ExampleConnector(KVConnectorBase_V1):
    """``kv_connector_extra_config``: ``shared_storage_path``, the folder (``/tmp`` by default).

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert kv_cache_config is not None
        assert self._kv_transfer_config is not None
        refuse_scales_of_a_run(vllm_config, type(self).__name__)
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._kv_caches: dict[str, torch.Tensor] = {}
        path = self._kv_transfer_config.get_from_extra_config("shared_storage_path", "/tmp")
        # Bytes of another model must not be found.
        self._key = repr(
            (
                vllm_config.model_config.model,
                vllm_config.model_config.dtype_name,
                vllm_config.cache_config.cache_dtype,
                vllm_config.cache_config.kv_cache_dtype_skip_layers,
                vllm_config.parallel_config.tensor_parallel_size,
            )
        )
        self._root = Path(path)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"shared_storage_path {path} cannot be used: {error}",
                parameter="kv_connector_extra_config",
                value=path,
            ) from None
        self._loads: list[_Blocks] = []
        self._manager: Any = None
        self._unsaved: dict[str, Request] = {}
        self._found: dict[str, tuple[str, int]] = {}

    def _folder(self, token_ids: list[int], num_tokens: int) -> str:
        text = f"{self._key}{self._block_size}{token_ids[:num_tokens]}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _full_tokens(self, request: Request) -> int:
        """Tokens of the prompt's full blocks, leaving one token to compute."""
        return (request.num_prompt_tokens - 1) // self._block_size * self._block_size

    # Scheduler half

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        self._manager = kv_cache_manager

    def on_new_request(self, request: Request) -> None:
        self._unsaved[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        num_tokens = self._full_tokens(request)
        if num_tokens <= num_computed_tokens:
            return 0, False
        folder = self._folder(request.prompt_token_ids, num_tokens)
        if not (self._root / folder / _COMPLETE).exists():
            return 0, False
        self._found[request.request_id] = folder, num_computed_tokens
        return num_tokens - num_computed_tokens, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        found = self._found.pop(request.request_id, None)
        if found is None or num_external_tokens == 0:
            return
        folder, num_computed = found
        first = num_computed // self._block_size
        end = (num_computed + num_external_tokens) // self._block_size
        self._loads.append(_Blocks(folder, blocks.get_block_ids()[0][first:end], first))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ExampleConnectorMetadata:
        loads, self._loads = self._loads, []
        metadata = ExampleConnectorMetadata(loads)
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self._unsaved.get(request_id)
            # Of a prompt in chunks, the step that computes the last full block saves them all.
            if request is None or request.num_computed_tokens + count < self._full_tokens(request):
                continue
            del self._unsaved[request_id]
            num_tokens = self._full_tokens(request)
            folder = self._folder(request.prompt_token_ids, num_tokens)
            if num_tokens and not (self._root / folder / _COMPLETE).exists():
                row = self._manager.get_block_ids(request_id)[0]
                metadata.saves.append(_Blocks(folder, row[: num_tokens // self._block_size]))
        return metadata

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._unsaved.pop(request.request_id, None)
        self._found.pop(request.request_id, None)
        return False, None

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = kv_caches

    def _file(self, folder: str, layer_name: str) -> Path:
        rank = get_tensor_model_parallel_rank()
        return self._root / folder / f"{layer_name}.rank{rank}.safetensors"

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        from safetensors.torch import load_file

        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ExampleConnectorMetadata)
        for load in metadata.loads:
            for name, cache in self._kv_caches.items():
                stored = load_file(self._file(load.folder, name))["kv"]
                end = load.first + len(load.block_ids)
                cache[load.block_ids] = stored[load.first : end].to(cache.device)
            logger.debug("Loaded %d blocks from %s", len(load.block_ids), load.folder)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads have ended before the forward pass."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        from safetensors.torch import save_file

        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ExampleConnectorMetadata)
        for save in metadata.saves:
            (self._root / save.folder).mkdir(exist_ok=True)
            blocks = self._kv_caches[layer_name][save.block_ids].cpu()
            save_file({"kv": blocks}, self._file(save.folder, layer_name))

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ExampleConnectorMetadata)
        for save in metadata.saves:
            marker = self._root / save.folder / f".{os.getpid()}"
            marker.touch()
            marker.rename(self._root / save.folder / _COMPLETE)
