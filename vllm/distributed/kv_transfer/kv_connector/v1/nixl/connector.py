"""NixlConnector: prefill here, decode there, over NIXL.

The decoder reads (pull), or the prefill engine writes (push). Two halves:
``scheduler.NixlScheduler`` and ``worker.TransferWorker``.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import compatibility_factors
from vllm.distributed.kv_transfer.kv_connector.v1.halves import TwoHalvesConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    CONNECTOR_VERSION,
    NixlHandshakeMetadata,
    NixlStepMetadata,
    parse_settings,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.scheduler import NixlScheduler
from vllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.worker import TransferWorker
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["NixlConnector", "NixlPushConnector"]


class NixlConnector(TwoHalvesConnector):
    """``kv_connector_extra_config`` is a ``messages.NixlSettings``.

    Raises:
        ConfigError: the settings cannot work, or NIXL is not installed.
    """

    _scheduler: NixlScheduler
    pushes = False
    """The owner writes, where this class says so; else the decoder reads."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert kv_cache_config is not None
        assert self._kv_transfer_config is not None
        buffer, device = self._kv_transfer_config.kv_buffer_device, vllm_config.device_config
        if buffer not in (None, "cpu", device.device_type):
            raise ConfigError(
                f"kv_buffer_device {buffer}: blocks lie in {device.device_type} memory; leave it "
                'out, or say "cpu" for a buffer in host memory',
                parameter="kv_buffer_device",
                value=buffer,
            )
        self._settings = parse_settings(
            type(self).__name__, self._kv_transfer_config.kv_connector_extra_config
        )
        if buffer == "cpu" and self._settings.staging_slots == 0:
            raise ConfigError(
                'kv_buffer_device "cpu": the buffer is the staging ring, so staging_slots in '
                "kv_connector_extra_config cannot be 0",
                parameter="kv_buffer_device",
            )
        self._worker: TransferWorker | None = None
        self._scales: dict[str, tuple[float, float]] = {}
        self._handshake: NixlHandshakeMetadata | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = NixlScheduler(vllm_config, self._settings, kv_cache_config)

    def _factors(self) -> dict[str, str]:
        name = f"{type(self).__name__} {CONNECTOR_VERSION}"
        factors = compatibility_factors(self._vllm_config, name, self._scales)
        # Plans compare number formats layer by layer: some pairs are converted.
        del factors["kv_cache_dtype"]
        return factors

    # Worker half

    def register_kv_scales(self, scales: dict[str, tuple[float, float]]) -> None:
        self._scales = scales

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.assembly import start_worker
        from vllm.distributed.kv_transfer.transport.peer_memory import PeerMemoryPort

        assert self._kv_cache_config is not None
        port = PeerMemoryPort(
            f"vllm-{uuid.uuid4().hex}", self._settings.backends, self._settings.num_threads
        )
        self._worker, payload = start_worker(
            self._vllm_config,
            self._kv_cache_config,
            self._settings,
            kv_caches,
            port,
            self._factors(),
            pushes=self.pushes,
        )
        self._worker.set_scales(self._scales)
        self._introduce(self._worker)
        self._handshake = NixlHandshakeMetadata(payload)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._handshake

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        assert self._worker is not None
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, NixlStepMetadata)
        if metadata.says_something:
            if metadata.receives and self._vllm_config.device_config.device_type == "cuda":
                import torch

                # A step that is under way may still write for a request that has just ended.
                metadata.after = torch.cuda.Event()
                metadata.after.record()
            self._worker.submit(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Whole requests are fetched once they have ended."""

    def wait_for_save(self) -> None:
        """Nothing is saved inside a step."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._worker is not None
        return self._worker.take_results()

    def get_kv_connector_stats(self) -> dict[str, float] | None:
        assert self._worker is not None
        return self._worker.take_stats()

    # Scheduler half

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        payloads = {}
        for rank, item in metadata.items():
            assert isinstance(item, NixlHandshakeMetadata)
            payloads[rank] = item.payload
        self._scheduler.serve_handshakes(payloads)

    # Both

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self.role is KVConnectorRole.SCHEDULER:
            self._scheduler.shutdown()


class NixlPushConnector(NixlConnector):
    """The decoder announces its blocks, and the prefill engine writes into them."""

    pushes = True
